# SPDX-License-Identifier: Apache-2.0
"""Exact LoRA on projections that vLLM fuses N-way, as a vLLM general plugin.

vLLM imports this module in every one of its processes, and only logs an import error. This module
therefore imports nothing outside the standard library; the functions import what they use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from vllm_nway_lora.diagnosis.translate import Translation

__version__ = "0.2.0"
__all__ = ["__version__", "register", "translate", "unregister"]


def register() -> None:
    """Turn the plugin on in this process, as ``VLLM_NWAY_LORA`` says (entry point ``nway_lora``).

    Can be called any number of times. Patches a module of vLLM when that module is imported, and
    imports neither torch nor ``vllm.lora``.

    Raises:
        ValueError: ``VLLM_NWAY_LORA`` or ``VLLM_NWAY_LORA_CPU`` has an invalid value.
        RuntimeError: ``VLLM_NWAY_LORA=strict``, and a patch cannot be applied in this process.
    """
    from vllm_nway_lora.compat import registration

    registration.register()


def unregister() -> None:
    """Undo every patch of this process. Layers that already exist stay as they are."""
    from vllm_nway_lora.compat import registration

    registration.unregister()


def translate(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    model: str,
    *,
    model_impl: str = "auto",
) -> Translation:
    """Translate an adapter of any layout into PEFT's, for the modules of ``model``'s checkpoint.

    The products ``scaling * B A`` stay the same. No weight of the model is read, and nothing is served.

    Args:
        tensors: name -> tensor, in one of the layouts of docs/layouts.md.
        config: adapter_config.json.
        model: a local folder with ``config.json``.
        model_impl: ``--model-impl`` of ``vllm serve``.

    Returns:
        A dict of tensors by PEFT's names, with the attributes ``config`` (the adapter_config.json that
        belongs to them) and ``rules`` (what was translated).

    Raises:
        ValueError: the adapter has no exact translation; the message names modules and shapes.
        RuntimeError: the plugin is off in this process.
    """
    from vllm_nway_lora.diagnosis.translate import translate_tensors

    return translate_tensors(tensors, config, model, model_impl=model_impl)
