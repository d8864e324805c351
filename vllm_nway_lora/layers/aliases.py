# SPDX-License-Identifier: Apache-2.0
"""Layers that their model reaches by more than one way: one LoRA layer for all, or no LoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention.mla_attention import MLAAttention

from vllm_nway_lora.layers.direct import serve_direct_products
from vllm_nway_lora.layers.mixers import correct_mixers
from vllm_nway_lora.layers.mla import correct_attention
from vllm_nway_lora.layers.readers import Reader, find_readers
from vllm_nway_lora.models import tables
from vllm_nway_lora.rows.notes import get_notes, set_notes

logger = logging.getLogger("vllm.nway_lora")


def create_lora_modules(wrapped: Callable[..., None], manager: Any, args: Any, kwargs: Any) -> None:
    """Create the LoRA layers, one per base layer; wraps ``LoRAModelManager._create_lora_modules``.

    Every name of a layer then leads to its LoRA layer. Where the model uses the base layer in another
    way, adapters on it are refused: the base model would answer under their names.
    """
    wrapped(*args, **kwargs)
    _merge_second_names(manager)
    names = {
        id(layer.base_layer): name
        for name, layer in manager.modules.items()
        if isinstance(layer, BaseLinearLayerWithLoRA)
    }
    refused: dict[tuple[str, str], list[str]] = {}
    correct_mixers(manager.model)
    serve_direct_products(manager.model)
    obstacles = correct_attention(manager.model)
    for reader in (*find_readers(manager.model, [manager]), *_find_absorbed(manager.model)):
        name = names.get(id(reader.layer))
        if name is None:
            continue
        if reader.is_child and (_is_known(reader) or not _reads_weight(reader)):
            setattr(reader.holder, reader.attribute, manager.modules[name])
            continue
        obstacle = obstacles.get(id(reader.layer))
        if obstacle == "" and isinstance(reader.holder, MLAAttention):
            continue
        known = get_notes(reader.layer).refusals
        reason = _explain(reader.holder) + (f": {obstacle}" if obstacle else "")
        modules = [path.rpartition(".")[2] for path in manager.packed_modules.get(name) or [name]]
        refusals = {module: reason for module in modules if module not in known}
        set_notes(reader.layer, refusals={**known, **refusals})
        for module in refusals:
            refused.setdefault((module, reason), []).append(name)
    for (module, reason), layers in refused.items():
        others = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
        logger.info("Adapters on %s (%s%s) will be refused: %s.", module, layers[0], others, reason)


def _merge_second_names(manager: Any) -> None:
    """Put one LoRA layer in the place of two that have the same base layer.

    Until 0.21.0 vLLM wraps a layer with two names in its model once per name (the MLA projections:
    ``self_attn.X`` and ``self_attn.mla_attn.X``). Adapters use the first name, the forward uses the
    second. From 0.22.0 on both names lead to the first LoRA layer, as they do here.
    """
    first: dict[int, Any] = {}
    for name, module in list(manager.modules.items()):
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        if id(module.base_layer) not in first:
            first[id(module.base_layer)] = module
            continue
        parent, _, child = name.rpartition(".")
        setattr(manager.model.get_submodule(parent), child, first[id(module.base_layer)])
        # No adapter has tensors under this name, so vLLM would reset what the first name has set.
        del manager.modules[name]
        manager.packed_modules.pop(name, None)


def _find_absorbed(model: nn.Module) -> list[Reader]:
    """Return the layers whose weights vLLM's MLA attention has copied into its own.

    It multiplies by the parts of ``kv_b_proj`` when it decodes, also where its implementation does not
    keep the layer (the sparse ones until 0.24.0). DeepSeek-V3.2's attention is one of its subclasses
    and calls the other layers. What :mod:`vllm_nway_lora.layers.mla` has corrected is returned too.
    """
    return [
        Reader(attention, name, child.base_layer, is_child=False)
        for attention in model.modules()
        for owner in type(attention).__mro__
        if owner.__name__ == "MLAAttention"
        for name, child in attention.named_children()
        if isinstance(child, BaseLinearLayerWithLoRA) and name in _names_copied_by(owner)
    ]


def _names_copied_by(owner: type) -> tuple[str, ...]:
    copying = vars(owner).get("process_weights_after_loading")
    code = getattr(copying, "__code__", None)
    return code.co_names if code is not None else ()


def _is_known(reader: Reader) -> bool:
    """Return whether the tables know when a layer's second parent reads its weight, and when it calls it.

    If it reads the weight here, adapters on the layer have been refused when the model was prepared.
    """
    owners = {owner.__name__ for owner in type(reader.holder).__mro__}
    return any(read.parent in owners and read.layer == reader.attribute for read in tables.READS)


def _reads_weight(reader: Reader) -> bool:
    """Return whether a method of a layer's second parent seems to read the layer's weight."""
    return any(
        {reader.attribute, "weight"} <= set(code.co_names)
        for owner in type(reader.holder).__mro__
        if owner is not nn.Module
        for member in vars(owner).values()
        if (code := getattr(member, "__code__", None)) is not None
    )


def _explain(owner: Any) -> str:
    kind = type(owner)
    return (
        f"{kind.__qualname__} ({kind.__module__}) uses the layer's weight past its LoRA, so that the "
        "base model would answer"
    )
