# SPDX-License-Identifier: Apache-2.0
"""Exact LoRA on projections that vLLM fuses N-way, as a vLLM general plugin.

vLLM imports this module in every one of its processes, and only logs an import error. This module
therefore imports nothing outside the standard library; the functions import what they use.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "register", "unregister"]


def register() -> None:
    """Turn the plugin on in this process, as ``VLLM_NWAY_LORA`` says (entry point ``nway_lora``).

    Can be called any number of times. Patches a module of vLLM when that module is imported, and
    imports neither torch nor ``vllm.lora``.

    Raises:
        ValueError: ``VLLM_NWAY_LORA`` has an invalid value.
        RuntimeError: ``VLLM_NWAY_LORA=strict``, and a patch cannot be applied in this process.
    """
    from vllm_nway_lora.compat import registration

    registration.register()


def unregister() -> None:
    """Undo every patch of this process. Layers that already exist stay as they are."""
    from vllm_nway_lora.compat import registration

    registration.unregister()
