# SPDX-License-Identifier: Apache-2.0
"""Exact LoRA on projections that vLLM fuses N-way, as a vLLM general plugin.

vLLM imports this module in every one of its processes and only logs an import error, so nothing
but the standard library is imported here; the work happens inside the functions.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "register", "unregister"]


def register() -> None:
    """Turn the plugin on in this process, as ``VLLM_NWAY_LORA`` says (entry point ``nway_lora``).

    May be called any number of times. Patches vLLM's modules only once they are imported, and
    imports neither torch nor ``vllm.lora`` by itself.

    Raises:
        ValueError: ``VLLM_NWAY_LORA`` is none of the values it can take.
        RuntimeError: ``VLLM_NWAY_LORA=strict`` and the plugin cannot do its whole job here.
    """
    from vllm_nway_lora import patches

    patches.register()


def unregister() -> None:
    """Undo every patch of this process; layers that were already built stay as they are."""
    from vllm_nway_lora import patches

    patches.unregister()
