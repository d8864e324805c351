# SPDX-License-Identifier: Apache-2.0
"""Compare the slots of vLLM's LoRA layers on mixtures of experts with the mixtures' trace."""

from __future__ import annotations

from typing import Any

import torch

from vllm_nway_lora.rows.experts import HeldExperts


def find_difference(lora_layer: Any, mixture: HeldExperts) -> str:
    """Return where vLLM's slots differ from the trace, as a phrase; empty if they are equal.

    Args:
        lora_layer: ``FusedMoEWithLoRA`` or ``FusedMoE3DWithLoRA``.
        mixture: what the base layer's weights hold on this rank.

    Raises:
        ValueError: the layer's weights have other sizes than the twin's, because a kernel pads them.
    """
    local = lora_layer.w13_lora_b_stacked[0].shape[1]
    first = local * lora_layer.ep_rank if getattr(lora_layer, "use_ep", False) else 0
    for number, grid, name in ((0, mixture.w13, "w13"), (1, mixture.w2, "w2")):
        kinds = _kinds_of(mixture, number)
        expected, rows = _rows(lora_layer, mixture, kinds, number)
        columns = _columns(lora_layer, mixture, number)
        found = tuple(grid.modules.shape), grid.columns.shape[2]
        if found != ((local, len(rows)), _width(lora_layer, number)):
            raise ValueError(f"{name} has other sizes than vLLM's slots: {found}")
        places = "of the experts' " + " and ".join(mixture.kinds[kind] for kind in kinds)
        experts = torch.arange(first, first + local).unsqueeze(1)
        modules = torch.where(
            expected >= 0,
            expected + (0 if mixture.is_stacked else experts * len(mixture.kinds)),
            -1,
        )
        found_experts = grid.experts if mixture.is_stacked else experts
        if not torch.equal(grid.modules, modules.expand_as(grid.modules)) or not bool(
            ((found_experts == experts) | (modules < 0)).all()
        ):
            return (
                f"vLLM adds the rows {places} to other modules or experts than those that the model "
                "loads there on this rank"
            )
        if not bool((grid.rows == rows).all()):
            return f"vLLM puts the rows {places} in other places than the model loads them on this rank"
        if not bool((grid.columns == columns).all()):
            return f"vLLM multiplies LoRA-A {places} by other columns than the model loads on this rank"
    return ""


def _kinds_of(mixture: HeldExperts, number: int) -> list[int]:
    return [1] if number else [kind for kind in range(len(mixture.kinds)) if kind != 1]


def _rows(
    lora_layer: Any, mixture: HeldExperts, kinds: list[int], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kind, and its row, that vLLM adds to each row of a weight: int64, ``(rows,)``."""
    if number:
        rows = torch.arange(mixture.shapes[1][0])
        return torch.ones_like(rows), rows
    slots = lora_layer.w13_lora_b_stacked
    if len(slots) != len(kinds):
        raise ValueError(f"vLLM has {len(slots)} slots for {len(kinds)} modules")
    of_kinds, of_rows = [], []
    for kind, slot in zip(kinds, slots, strict=True):
        taken = lora_layer._slice_w13_b(torch.arange(mixture.shapes[kind][0]).reshape(1, -1, 1))
        rows = torch.full((slot.shape[2],), -1)
        rows[: taken.shape[1]] = taken[0, :, 0]
        of_rows.append(rows)
        of_kinds.append(torch.where(rows >= 0, kind, -1))
    return torch.cat(of_kinds), torch.cat(of_rows)


def _columns(lora_layer: Any, mixture: HeldExperts, number: int) -> torch.Tensor:
    columns = torch.arange(mixture.shapes[number][1])
    # LoRA-A of gate and up is cut along the rank only.
    taken: torch.Tensor = (
        lora_layer._slice_w2_a(columns.reshape(1, 1, -1))[0, 0] if number else columns
    )
    return taken


def _width(lora_layer: Any, number: int) -> int:
    slots = (lora_layer.w13_lora_a_stacked, lora_layer.w2_lora_a_stacked)[number]
    return int(slots[0].shape[-1])
