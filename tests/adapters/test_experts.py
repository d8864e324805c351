"""Adapters on experts are exact in vLLM's layers, or refused before they are registered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.moe import (
    DOWN,
    EXPERTS,
    GATE_UP,
    HIDDEN,
    INTERMEDIATE,
    PATH,
    RANK,
    A,
    B,
    Experts,
    Tensors,
    assert_exact,
    deep,
    expect_flat,
    expect_per_expert,
    expect_shared,
    flat,
    integers,
    per_expert,
    shared,
)
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager

HAS_MIXED = hasattr(LoRAModelManager, "_convert_3d_to_2d_moe_lora")
HAS_SHARED = hasattr(PackedLoRALayerWeights, "pack_moe_stacked")
HAS_EXPERT_PARALLEL = hasattr(LoRAModelManager, "_restrict_to_local_experts")


pytestmark = pytest.mark.usefixtures("plugin")


@pytest.mark.parametrize("tensors", [flat, deep])
@pytest.mark.parametrize(
    "mixed",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not HAS_MIXED, reason="no mixed format")),
    ],
    ids=["3d", "mixed"],
)
def test_stacked_experts_are_exact(tensors: Callable[[], Tensors], mixed: bool) -> None:
    experts = Experts(stacked=not mixed, mixed=mixed, is_3d_file=mixed)
    assert_exact(experts, tensors(), expect_flat(flat()))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_apart_are_exact(gated: bool, mixed: bool) -> None:
    first = ("gate_proj", "up_proj") if gated else ("up_proj",)
    tensors = per_expert(gated)
    experts = Experts(gated=gated, mixed=mixed)
    assert_exact(experts, tensors, expect_per_expert(tensors, first))


@pytest.mark.skipif(not HAS_EXPERT_PARALLEL, reason="no expert parallelism with LoRA")
@pytest.mark.parametrize("ep_rank", [0, 1])
def test_experts_of_a_rank_are_exact(ep_rank: int) -> None:
    local = slice(ep_rank * EXPERTS // 2, (ep_rank + 1) * EXPERTS // 2)
    experts = Experts(stacked=True, ep_rank=ep_rank)
    assert_exact(experts, flat(), [delta[local] for delta in expect_flat(flat())])
    tensors = per_expert()
    expected = [delta[local] for delta in expect_per_expert(tensors, ("gate_proj", "up_proj"))]
    # vLLM reads a rank's experts only, where it reads a file.
    kept = {n: t for n, t in tensors.items() if int(n.split(".")[1]) in range(EXPERTS)[local]}
    assert_exact(Experts(ep_rank=ep_rank), kept, expected)
    expected[1][0] = 0
    assert_exact(Experts(ep_rank=ep_rank), without(kept, f".{local.start}.down_proj"), expected)


@pytest.mark.skipif(not HAS_SHARED, reason="no shared experts' tensors")
def test_shared_tensors_are_exact_and_flat_ones_refused() -> None:
    tensors = shared()
    assert_exact(Experts(shared=True), tensors, expect_shared(tensors))
    tensors = {name: t[0] for name, t in tensors.items()}
    error = Experts(shared=True).add(tensors)
    assert "expected LoRA-A (6, r, 32), or (1, r, 32) for a matrix that its experts share" in error


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def with_b_by_expert(tensors: Tensors) -> Tensors:
    """Return LoRA-B as ``(experts, rows, r)``, Megatron-Bridge's layout in memory."""
    return {n: t.permute(2, 0, 1) if n.endswith(B) else t for n, t in tensors.items()}


def with_one_wider(tensors: Tensors) -> Tensors:
    return tensors | {
        f".2.up_proj.{A}": integers(RANK, HIDDEN + 1),
        f".2.up_proj.{B}": integers(INTERMEDIATE, RANK),
    }


EXPECTED = f"of {EXPERTS} experts of rank {RANK}"
OTHER_SHAPES = (
    f"expected the tensors of {EXPERTS} experts, LoRA-A (6 * r, columns) and LoRA-B (rows, r * 6)"
)
WIDER = (
    f"module {PATH}.2.up_proj (layer {PATH}, FusedMoEWithLoRA): expected LoRA-A (r, 32) and LoRA-B "
    "(16, r), found (4, 33) and (16, 4)"
)

#: Case -> arguments of `Experts`, tensors, a part of the error.
REFUSED: dict[str, tuple[dict[str, bool], Tensors, str]] = {
    "flat, other number of experts": ({"stacked": True}, flat(2 * EXPERTS), EXPECTED),
    "flat, fewer experts": ({"stacked": True}, flat(EXPERTS // 2), EXPECTED),
    "flat, other rank": ({"stacked": True}, flat(rank=RANK // 2), EXPECTED),
    "3-D, other number of experts": ({"stacked": True}, deep(2 * EXPERTS), OTHER_SHAPES),
    "3-D, other rank": ({"stacked": True}, deep(rank=2 * RANK), EXPECTED),
    "A flat, B 3-D": (
        {"stacked": True},
        flat() | {n: t for n, t in deep().items() if n.endswith(B)},
        OTHER_SHAPES,
    ),
    "1-D": ({"stacked": True}, flat() | {f"{DOWN}{B}": integers(HIDDEN)}, OTHER_SHAPES),
    "stacked, no B": (
        {"stacked": True},
        without(flat(), f"{GATE_UP}{B}"),
        f"module {PATH}.base_layer (layer {PATH}, FusedMoE3DWithLoRA): it has LoRA-A but no LoRA-B",
    ),
    "stacked, no down, square": (
        {"stacked": True},
        {n: t for n, t in flat().items() if GATE_UP in n},
        "it is gate_up_proj alone and has as many columns as rows, 32, so that its shapes do not tell",
    ),
    "stacked, NaN": (
        {"stacked": True},
        flat() | {f"{DOWN}{A}": flat()[f"{DOWN}{A}"] * float("nan")},
        f"module {PATH}: LoRA-A times its scaling 1.0 has NaN",
    ),
    "an expert more": (
        {},
        per_expert() | {n.replace(".2.", ".6."): t for n, t in per_expert().items() if ".2." in n},
        f"module {PATH}.6.up_proj (layer {PATH}, FusedMoEWithLoRA): the model has experts 0 to 5",
    ),
    "other rank": ({}, per_expert(rank=2 * RANK), "says rank 4, found LoRA-A (8, 32)"),
    "one expert wider": ({}, with_one_wider(per_expert()), WIDER),
    "one expert wider, not gated": (
        {"gated": False},
        with_one_wider(per_expert(gated=False)),
        WIDER,
    ),
    "3-D per expert": (
        {},
        {name: t.unsqueeze(0) for name, t in per_expert().items()},
        "expected two-dimensional tensors, found LoRA-A (1, 4, 32) and LoRA-B (1, 16, 4)",
    ),
}


ZEROS_LEFT = {
    "one expert missing": (".2.",),
    "down only": ("gate", "up"),
    "one module missing": (".4.gate_proj",),
}


@pytest.mark.parametrize("case", ZEROS_LEFT)
def test_missing_modules_are_zeros(case: str) -> None:
    tensors = per_expert()
    removed = without(tensors, *ZEROS_LEFT[case])
    zeros = {n: t if n in removed else torch.zeros_like(t) for n, t in tensors.items()}
    assert_exact(Experts(), removed, expect_per_expert(zeros))


@pytest.mark.parametrize("is_flagged", [False, True])
def test_stacked_file_on_experts_apart_is_exact(is_flagged: bool) -> None:
    assert_exact(Experts(is_3d_file=is_flagged), flat(), expect_flat(flat()))


def test_experts_apart_on_a_stacked_layer_are_exact() -> None:
    """Of twice the rank, which is the limit here."""
    assert_exact(Experts(stacked=True), per_expert(), expect_per_expert(per_expert()))


def test_b_by_expert_is_exact() -> None:
    assert_exact(Experts(stacked=True), with_b_by_expert(deep()), expect_flat(flat()))


@pytest.mark.parametrize("case", REFUSED)
def test_other_experts_are_refused(case: str) -> None:
    options, tensors, text = REFUSED[case]
    experts = Experts(**options)
    error = experts.add(tensors)
    assert error.startswith("AdapterError: LoRA adapter with id 1 (from memory) is refused")
    assert text in error
    assert not experts.manager._registered_adapters
    assert not any(delta.any() for delta in experts.deltas())


def test_rank_above_the_limit_is_refused() -> None:
    assert "its rank 16 is above --max-lora-rank 8" in Experts().add(per_expert(rank=16), rank=16)
