"""Slots of a real vLLM fused layer: set, refused, set again, warmed up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from support.layers import INPUT_SIZE, MAX_RANK, Case, Fusion, build, set_adapter, tensors


def try_set(fusion: Fusion, lora_a: Any, lora_b: Any) -> tuple[str, bool]:
    """Set a slot that already has an adapter.

    Returns:
        The error's text, empty if there is none; and True if there was an error and all of the
        layer's stacked tensors are unchanged.
    """
    layer = build(Case(fusion, ()))
    rows = [fusion.rows(module) for module in range(len(fusion.modules))]
    rank = 4
    lora_a_before = [torch.ones(rank, INPUT_SIZE)] * len(rows)
    layer.set_lora(1, lora_a_before, [torch.full((r, rank), 2.0) for r in rows])
    stacks = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    before = [stack.clone() for stack in stacks]
    try:
        layer.set_lora(1, lora_a, lora_b)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, stacks))
    return "", False


def set_error(fusion: Fusion, lora_a: Any, lora_b: Any) -> str:
    """Set a slot of a new layer; return the error."""
    try:
        build(Case(fusion, ())).set_lora(0, lora_a, lora_b)
    except ValueError as error:
        return str(error)
    return ""


def set_in_turn(case: Case) -> bool:
    """Set slot 1 to the case's adapter in a fresh layer and in a used one.

    In the used layer, slot 1 has had an adapter on all modules before.

    Returns:
        True if the stacked tensors are the same in both layers and slot 0 is zero.
    """
    used, fresh = build(case), build(case)
    whole = replace(case, rank=MAX_RANK, adapters=(tuple(range(len(case.fusion.modules))),))
    for layer, cases in ((used, (whole, case)), (fresh, (case,))):
        for each in cases:
            [adapter] = tensors(each)[2]
            set_adapter(layer, 1, adapter)
    pairs = zip(
        (*used.lora_a_stacked, *used.lora_b_stacked),
        (*fresh.lora_a_stacked, *fresh.lora_b_stacked),
        strict=True,
    )
    return all(torch.equal(a, b) and bool(a[0].eq(0).all()) for a, b in pairs)


def warm_up(fusion: Fusion) -> str:
    """Set a slot to dummies as vLLM's ``create_dummy_lora`` builds them; return the error's text.

    Their LoRA-B is zero and has the rows of this TP rank. The text is empty if there is no error.
    """
    layer = build(Case(fusion, ()))
    dummies = [torch.zeros(b.shape[2], 4) for b in layer.lora_b_stacked]
    for count in {len(fusion.modules), len(dummies)}:
        try:
            layer.set_lora(0, [torch.ones(4, INPUT_SIZE)] * count, dummies[:count])
        except ValueError as error:
            return str(error)
    return ""
