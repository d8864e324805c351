# SPDX-License-Identifier: Apache-2.0
"""Prepare a built model for LoRA, before vLLM's LoRA manager wraps its first layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm import platforms
from vllm.model_executor.models.utils import WeightsMapper

from vllm_nway_lora.models import gemma3n, k2_horizon, muse_spark, tables
from vllm_nway_lora.models.fast_prefill import refuse_cross_decoders
from vllm_nway_lora.models.mapping import complete_mapping
from vllm_nway_lora.models.switched_on import refuse_untraced
from vllm_nway_lora.models.traced import trace_model
from vllm_nway_lora.models.transformers_names import note_config
from vllm_nway_lora.rows.notes import set_notes

logger = logging.getLogger("vllm.nway_lora")


def prepare_and_map(
    wrapped: Callable[..., dict[str, list[str]]], _: Any, args: Any, kwargs: Any
) -> dict[str, list[str]]:
    """Prepare the model, then return its completed mapping; wraps ``process_packed_modules_mapping``.

    vLLM's LoRA manager calls that function once, on the built model, and wraps the layers next. In
    0.17.0 to 0.33.0 it is the last call before that, which is why the model is prepared here.
    """
    model: nn.Module = args[0] if args else kwargs["model"]
    prepare_model(model)
    note_config(model)
    mapping = complete_mapping(model, wrapped(*args, **kwargs))
    trace_model(model, mapping)
    refuse_untraced(model, mapping)
    refuse_cross_decoders(model, mapping)
    return mapping


def prepare_model(model: nn.Module) -> None:
    """Change what keeps LoRA on ``model`` from being exact, and write notes on its layers."""
    add_renames(model)
    mark_unsupported_modules(model)
    disable_fused_kernels(model)
    for model_file in (gemma3n, k2_horizon, muse_spark):
        try:
            model_file.prepare(model)
        except AttributeError as error:  # from a class of another package with the same name
            logger.warning(
                "vllm-nway-lora cannot prepare %s for LoRA (%s). vLLM places the rows of adapters on its "
                "fused projections.",
                type(model).__name__,
                error,
            )


def add_renames(model: nn.Module) -> None:
    """Add to ``model``'s name mapper the renames that its class applies only when loading weights."""
    renames = tables.RENAMES.get(type(model).__name__)
    if renames is None:
        return
    mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    unknown = {old: new for old, new in renames.items() if old not in mapper.orig_to_new_substr}
    model.hf_to_vllm_mapper = mapper | WeightsMapper(orig_to_new_substr=unknown)


def mark_unsupported_modules(model: nn.Module) -> None:
    """Note refusals on the layers that no LoRA layer can serve exactly."""
    for parent in model.modules():
        path = f"{type(parent).__module__}.{type(parent).__qualname__}"
        for name, layer in parent.named_children():
            for (owner, child), refusals in tables.UNSUPPORTED.items():
                if child == name and f".{path}".endswith(owner and f".{owner}"):
                    set_notes(layer, refusals=refusals)
        owners = {owner.__name__ for owner in type(parent).__mro__}
        for read in tables.READS:
            if read.parent in owners and _is_on(parent, read):
                _mark_read(model, parent, read)


def _is_on(parent: nn.Module, read: tables.Read) -> bool:
    """Return whether a weight is read on this platform and in this setting."""
    if read.platform and not getattr(platforms.current_platform, read.platform)():
        return False
    return not read.flag or getattr(parent, read.flag, None) not in (None, False)


def _mark_read(model: nn.Module, parent: nn.Module, read: tables.Read) -> None:
    try:
        layer = parent.get_submodule(read.layer)
    except AttributeError:  # not in this release, or not in this configuration
        return
    name = read.layer.rpartition(".")[2]
    modules = (getattr(model, "packed_modules_mapping", None) or {}).get(name, [name])
    reason = f"{read.reader} reads its weight directly and bypasses every LoRA layer"
    set_notes(layer, refusals=dict.fromkeys(modules, reason))


def disable_fused_kernels(model: nn.Module) -> None:
    """Turn off the kernels that read a layer's weight directly, where the model has a flag for it."""
    for module in model.modules():
        flag, value = tables.FUSED_KERNEL_FLAGS.get(type(module).__name__, ("", None))
        if flag and hasattr(module, flag):
            setattr(module, flag, value)
