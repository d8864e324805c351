# SPDX-License-Identifier: Apache-2.0
"""Mend what a model class says, or leaves unsaid, of its fused projections before LoRA is built.

vLLM's LoRA manager asks the built model once, through ``process_packed_modules_mapping``, which
modules each fused projection packs. That is the last moment before it wraps any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.utils import WeightsMapper

from vllm_nway_lora import fusions, k2_horizon, llama4, muse_spark
from vllm_nway_lora.claims import REFUSALS_ATTRIBUTE


def process_packed_modules_mapping(
    wrapped: Callable[..., dict[str, list[str]]], _: Any, args: Any, kwargs: Any
) -> dict[str, list[str]]:
    """Around vLLM's function of that name: return the mapping, completed."""
    model: nn.Module = args[0] if args else kwargs["model"]
    mapping = complete(model, wrapped(*args, **kwargs))
    rename(model)
    mark_unservable(model)
    close_bypasses(model)
    k2_horizon.prepare(model)
    llama4.prepare(model)
    return mapping | muse_spark.prepare(model)


def complete(model: nn.Module, mapping: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return ``mapping`` with the entries that ``model``'s layers need and it lacks.

    An entry that a submodule has, but that an outer class's own mapping hides, comes first; then
    the table of known omissions. Entries that are there stay, but for those that no layer can use
    or that name other modules than the layer has.
    """
    completed = {
        fused: modules
        for fused, modules in mapping.items()
        if fusions.UNUSABLE.get(fused) != frozenset(modules)
    }
    for fused, (said, so) in fusions.MISNAMED.items():
        if completed.get(fused) == said:
            completed[fused] = list(so)
    merged: dict[str, int] = {}  # by name, as vLLM looks entries up
    for name, layer in model.named_modules():
        if isinstance(layer, MergedColumnParallelLinear):
            merged[name.rpartition(".")[2]] = len(layer.output_sizes)
    hidden = _hidden_entries(model)
    for fused, n_outputs in merged.items():
        if fused in mapping:
            if fused in completed and len(completed[fused]) > n_outputs:
                completed[fused] = [m for m in completed[fused] if m not in fusions.PADDING]
            continue
        modules = hidden.get(fused) or list(fusions.MISSING.get(fused, ()))
        if len(modules) in (1, n_outputs):
            completed[fused] = modules
    return completed


def _hidden_entries(model: nn.Module) -> dict[str, list[str]]:
    """Collect the mappings of ``model``'s submodules, but for entries that they disagree on."""
    found: dict[str, list[str]] = {}
    disputed = set()
    for child in model.modules():
        for fused, modules in (getattr(child, "packed_modules_mapping", None) or {}).items():
            if found.setdefault(fused, list(modules)) != list(modules):
                disputed.add(fused)
    return {fused: modules for fused, modules in found.items() if fused not in disputed}


def rename(model: nn.Module) -> None:
    """Teach ``model``'s name mapper the renames that its class makes only while it loads weights."""
    renames = fusions.RENAMES.get(type(model).__name__)
    if renames is None:
        return
    mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    unknown = {old: new for old, new in renames.items() if old not in mapper.orig_to_new_substr}
    model.hf_to_vllm_mapper = mapper | WeightsMapper(orig_to_new_substr=unknown)


def mark_unservable(model: nn.Module) -> None:
    """Mark the layers that no LoRA layer can serve exactly, so that adapters on them are refused."""
    for parent in model.modules():
        path = f"{type(parent).__module__}.{type(parent).__qualname__}"
        for name, layer in parent.named_children():
            for (owner, child), refusals in fusions.UNSERVABLE.items():
                if child == name and f".{path}".endswith(owner and f".{owner}"):
                    setattr(layer, REFUSALS_ATTRIBUTE, refusals)


def close_bypasses(model: nn.Module) -> None:
    """Turn off the kernels that read a layer's weight past its LoRA, where the model has a way."""
    for module in model.modules():
        flag = fusions.BYPASSES.get(type(module).__name__)
        if flag is not None and hasattr(module, flag):
            setattr(module, flag, False)


def create_lora_modules(wrapped: Callable[..., None], manager: Any, args: Any, kwargs: Any) -> None:
    """Around the LoRA manager's method of that name: one LoRA layer per base layer.

    To 0.21.0 vLLM wraps a layer that has two names in its model once for each (the MLA
    projections: ``self_attn.X`` and ``self_attn.mla_attn.X``). Adapters go by the first name, the
    forward by the second. Later releases let both names lead to the first LoRA layer; so does this.
    """
    wrapped(*args, **kwargs)
    first: dict[int, Any] = {}
    for name, module in list(manager.modules.items()):
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        if id(module.base_layer) not in first:
            first[id(module.base_layer)] = module
            continue
        parent, _, child = name.rpartition(".")
        setattr(manager.model.get_submodule(parent), child, first[id(module.base_layer)])
        # Under this name no adapter has tensors, so vLLM would reset what the first name set.
        del manager.modules[name]
        manager.packed_modules.pop(name, None)
