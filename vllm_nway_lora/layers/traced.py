# SPDX-License-Identifier: Apache-2.0
"""Compare the slots of vLLM's own LoRA layers with the trace of their modules; plan from a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.plan import FusionPlan, build_traced_plan
from vllm_nway_lora.rows.probe import list_shards, read_outputs


def find_difference(lora_layer: Any, modules: Sequence[str], held: Mapping[str, Held]) -> str:
    """Return where vLLM's slots differ from the trace, as a phrase; empty if they are equal.

    Args:
        lora_layer: vLLM's LoRA layer.
        modules: the layer's adapter-visible modules.
        held: module -> what the base layer's weight holds of it on this rank.
    """
    if not isinstance(lora_layer, BaseLinearLayerWithLoRA) or not held:
        return ""
    widest = max(len(part.rows) for part in held.values())
    if sum(stacked.shape[2] for stacked in lora_layer.lora_b_stacked) > widest:
        # A QKV projection whose values are narrower than its keys: vLLM writes past the output.
        return "vLLM's slots have more rows than the layer has on this rank"
    places = _slots(lora_layer, modules, held)
    for module, part in held.items():
        a_columns, slot_rows = places[module]
        if not torch.equal(a_columns, part.columns):
            return f"vLLM multiplies other columns of {module} than its model loads on this rank"
        expected = torch.full((widest,), -1)
        expected[: len(slot_rows)] = slot_rows[:widest]
        if not torch.equal(expected, part.rows):
            return (
                f"vLLM puts the rows of {module} elsewhere than its model loads them on this rank"
            )
    return ""


def _slots(
    lora_layer: Any, modules: Sequence[str], held: Mapping[str, Held]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return per module the columns of A, and its rows at each row of the output, that vLLM takes."""
    sizes = [held[module].size if module in held else 0 for module in modules]
    max_rank = lora_layer.lora_config.max_lora_rank if hasattr(lora_layer, "lora_config") else 1
    columns = lora_layer.base_layer.input_size
    numbers = torch.arange(float(columns)).expand(max_rank, -1)
    lora_a: Any = [numbers for _ in modules]
    lora_b: Any = [torch.arange(float(size)).unsqueeze(1) for size in sizes]
    if len(modules) == 1:
        lora_a, lora_b = lora_a[0], lora_b[0]
    is_sharded_row = isinstance(lora_layer, RowParallelLinearWithLoRA)
    if lora_layer.tp_size > 1:
        lora_a = lora_layer.slice_lora_a(lora_a)
        # Its `fully_sharded_loras` class gathers the parts of LoRA-B's rows.
        lora_b = lora_b if is_sharded_row else lora_layer.slice_lora_b(lora_b)
    a_list = lora_a if isinstance(lora_a, (list, tuple)) else [lora_a]
    b_list = lora_b if isinstance(lora_b, (list, tuple)) else [lora_b]
    widths = [stacked.shape[2] for stacked in lora_layer.lora_b_stacked]
    starts = [sum(widths[:number]) for number in range(len(widths))]
    found = {}
    for module, a, b, start in zip(modules, a_list, b_list, starts, strict=True):
        rows = torch.full((start + len(b),), -1)
        rows[start:] = b[:, 0].long()
        found[module] = a[0].long(), rows
    return found


def plan_traced(
    layer: Any, name: str, modules: Sequence[str], held: Mapping[str, Held]
) -> FusionPlan:
    """Build the plan of a column-parallel layer from its trace.

    Args:
        layer: the base layer.
        name: its own name, the last part of its path.
        modules: its adapter-visible modules.
        held: module -> what the layer's weight holds of it on this rank.

    Raises:
        PlanError: no plan describes the trace.
    """
    missing = [module for module in modules if module not in held]
    filled = torch.stack([part.rows >= 0 for part in held.values()])
    regions: list[slice] = []
    if missing or bool((filled.sum(0) > 1).any()):
        # Another module's rows are in the region of one that the checkpoint does not have.
        shards = list_shards(layer)
        if len(shards) != len(modules):
            raise PlanError(f"{name}: its model does not load {', '.join(missing)}")
        for output in read_outputs(layer):
            where = torch.nonzero(output.column >= 0).flatten()
            regions.append(slice(int(where[0]), int(where[-1]) + 1))
    return build_traced_plan(name, modules, held, regions)
