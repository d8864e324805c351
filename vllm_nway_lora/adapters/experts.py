# SPDX-License-Identifier: Apache-2.0
"""Adapters on mixtures of experts: their modules, and the faults that vLLM does not report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA


def stacked_modules(manager: Any, adapter: Any, name: str, layer: nn.Module) -> list[str]:
    """Return the two modules of a mixture whose experts are stacked in one tensor; else nothing.

    The module ``experts`` is down_proj, ``experts.base_layer`` is gate_up_proj.
    """
    is_mixed_format = (
        isinstance(layer, FusedMoEWithLoRA)
        and getattr(manager, "_enable_mixed_moe_lora_format", False)
        and getattr(adapter, "is_3d_lora_weight", False)
    )
    if isinstance(layer, FusedMoE3DWithLoRA) or is_mixed_format:
        return [name, f"{name}.base_layer"]
    return []


def validate_experts(
    manager: Any, name: str, weights_of: Sequence[tuple[str, Any]]
) -> Iterator[str]:
    """Yield the faults that keep vLLM from stacking a mixture's experts.

    vLLM needs every module of every local expert, all with the same shapes.
    """
    by_module = dict(weights_of)
    local = list(by_module)
    if hasattr(manager, "_restrict_to_local_experts"):  # from 0.22.0 on
        local = manager._restrict_to_local_experts(name, local)
    missing = [module for module in local if by_module[module] is None]
    if missing and len(missing) < len(local):
        yield (
            f"layer {name}: all {len(local)} modules of its experts are needed, {missing[0]} and "
            f"{len(missing) - 1} others are missing"
        )
    if missing:
        return
    kinds = 2 if manager._is_non_gated_moe else 3
    if len(local) > kinds:
        for kind in range(kinds):
            shapes = {
                (tuple(by_module[m].lora_a.shape), tuple(by_module[m].lora_b.shape))
                for m in local[kind::kinds]
            }
            if len(shapes) > 1:
                yield f"layer {name}: its experts have different shapes: {sorted(shapes)[:2]}"
