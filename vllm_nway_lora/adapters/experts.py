# SPDX-License-Identifier: Apache-2.0
"""Adapters on mixtures of experts: their modules, and the faults that vLLM does not report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from vllm_nway_lora.rows.pairs import find_pair_fault


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


def find_stacked_fault(weights: Any, layer: Any) -> str:
    """Return the fault of a module that has the tensors of all experts; empty if there is none.

    vLLM (0.17.0 to 0.33.0) reshapes A to ``(experts, r, columns)`` and B to ``(rows, r, experts)``
    (``_stack_moe_lora_weights``, vllm/lora/model_manager.py). Files have these shapes, or two
    dimensions.
    """
    a, b, rank = weights.lora_a, weights.lora_b, weights.rank
    if a is None or b is None:
        return find_pair_fault(a, b)
    local: int = layer.w13_lora_a_stacked[0].shape[1]
    n = getattr(layer, "global_num_experts", local)  # 0.20.2 has no expert parallelism with LoRA
    found = (tuple(a.shape[:-1]), tuple(b.shape[1:]))
    if found in (((n * rank,), (n * rank,)), ((n, rank), (rank, n))):
        return ""
    return (
        f"expected the LoRA-A and LoRA-B of {n} experts of rank {rank}, ({n * rank}, columns) and "
        f"(rows, {n * rank}), or ({n}, {rank}, columns) and (rows, {rank}, {n}), found "
        f"{tuple(a.shape)} and {tuple(b.shape)}"
    )


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
            f"layer {name}: all {len(local)} modules of its experts are needed, {len(missing)} are "
            f"missing, such as {missing[0]}"
        )
    if missing:
        return
    kinds = 2 if manager._is_non_gated_moe else 3
    for kind in range(kinds):
        shapes = {
            (tuple(by_module[m].lora_a.shape), tuple(by_module[m].lora_b.shape))
            for m in local[kind::kinds]
        }
        if len(shapes) > 1:
            yield f"layer {name}: its experts have different shapes: {sorted(shapes)[:2]}"
