# SPDX-License-Identifier: Apache-2.0
"""Complete and correct the modules that a model class lists for its fused projections."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from vllm_nway_lora.models import tables
from vllm_nway_lora.rows.notes import get_notes


def complete_mapping(model: nn.Module, mapping: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return ``mapping`` with the entries that ``model``'s layers need and it lacks.

    A missing entry comes from a submodule whose mapping an outer class's own mapping hides, else
    from :data:`tables.UNLISTED`. Existing entries stay, except those that no layer can use and those
    that name other modules than the layer has. Changes neither ``model`` nor ``mapping``.

    Args:
        model: the built model.
        mapping: fused projection's name -> its modules, from ``process_packed_modules_mapping``.
    """
    completed = {
        fused: modules
        for fused, modules in mapping.items()
        if tables.UNUSABLE.get(fused) != frozenset(modules)
    }
    for fused, (declared, actual) in tables.MISNAMED.items():
        if completed.get(fused) == declared:
            completed[fused] = list(actual)
    merged: dict[str, int] = {}  # by name, as vLLM looks entries up
    noted: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(layer, MergedColumnParallelLinear):
            merged[name] = len(layer.output_sizes)
        if modules := get_notes(layer).modules:
            noted[name] = list(modules)
    hidden = find_hidden_entries(model)
    for fused, n_outputs in merged.items():
        if fused in mapping:
            if fused in completed and len(completed[fused]) > n_outputs:
                completed[fused] = [m for m in completed[fused] if m not in tables.PADDING]
            continue
        modules_of = hidden.get(fused) or list(tables.UNLISTED.get(fused, ()))
        if len(modules_of) in (1, n_outputs):
            completed[fused] = modules_of
    return completed | noted


def find_hidden_entries(model: nn.Module) -> dict[str, list[str]]:
    """Return the entries in the mappings of ``model``'s submodules on which all of these agree."""
    found: dict[str, list[str]] = {}
    disputed = set()
    for child in model.modules():
        for fused, modules in (getattr(child, "packed_modules_mapping", None) or {}).items():
            if found.setdefault(fused, list(modules)) != list(modules):
                disputed.add(fused)
    return {fused: modules for fused, modules in found.items() if fused not in disputed}
