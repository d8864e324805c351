"""Experts' tensors are compared with the sizes of their layer, whatever a kernel pads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import vllm
from support.moe import (
    EXPERTS,
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
    per_expert,
    shared,
)
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from vllm_nway_lora.compat import defects

plugin = pytest.mark.usefixtures("plugin")
HAS_MIXED = hasattr(LoRAModelManager, "_convert_3d_to_2d_moe_lora")
HAS_SHARED = hasattr(PackedLoRALayerWeights, "pack_moe_stacked")
HAS_PATTERNS = "rank_pattern" in PEFTHelper.__dataclass_fields__
#: vLLM cuts a rank's rows at the size without padding.
CUTS_UNPADDED = hasattr(FusedMoEWithLoRA, "_tp_shard_size")

#: Kind of layer -> arguments of `Experts`, the builder of its tensors.
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "3d": ({"stacked": True}, flat),
    "3d, three dimensions": ({"stacked": True}, deep),
    "mixed": ({"mixed": True, "is_3d_file": True}, flat),
    "apart": ({}, per_expert),
    "apart, not gated": ({"gated": False}, lambda **options: per_expert(gated=False, **options)),
    "shared": ({"shared": True}, shared),
}
EXISTING = [
    kind for kind in KINDS if (HAS_MIXED or kind != "mixed") and (HAS_SHARED or kind != "shared")
]


def refuse(experts: Experts, tensors: Tensors, **options: Any) -> str:
    """Check that an adapter is refused with no effect, and return the message."""
    error = experts.add(tensors, **options)
    assert error.startswith("AdapterError: LoRA adapter with id 1 (from memory) is refused"), error
    assert not experts.manager._registered_adapters
    assert not any(delta.any() for delta in experts.deltas())
    return error


@plugin
@pytest.mark.parametrize(
    "sizes", [(16, 8), (64, 32), (32, 8), (16, 16), (31, 16), (32, 17)], ids=str
)
@pytest.mark.parametrize("tp", [(0, 1), (1, 2)], ids=["tp1", "tp2"])
@pytest.mark.parametrize("kind", EXISTING)
def test_adapters_of_another_width_are_refused(
    kind: str, sizes: tuple[int, int], tp: tuple[int, int]
) -> None:
    options, build = KINDS[kind]
    error = refuse(Experts(**options, tp=tp), build(sizes=sizes))
    assert f"module {PATH}" in error
    assert type(Experts(**options).layer).__name__ in error
    assert "expected" in error


@plugin
def test_message_names_what_is_expected_and_found() -> None:
    error = refuse(Experts(stacked=True), flat(sizes=(16, 8)))
    assert (
        f"module {PATH}.base_layer (layer {PATH}, FusedMoE3DWithLoRA): expected 32 columns and 32 rows as "
        "gate_up_proj or 16 columns and 32 rows as down_proj, found LoRA-A of 16 columns and LoRA-B of 16 "
        "rows"
    ) in error
    assert (
        f"module {PATH}.0.up_proj (layer {PATH}, FusedMoEWithLoRA): expected LoRA-A (r, 32) and "
        "LoRA-B (16, r), found (4, 16) and (8, 4)"
    ) in refuse(Experts(), per_expert(sizes=(16, 8)))


@plugin
@pytest.mark.parametrize("sizes", [(64, 16), (32, 16), (32, 32), (16, 32)], ids=str)
@pytest.mark.parametrize("tp", [(0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("build", [flat, deep])
@pytest.mark.parametrize("kind", ["3d", *(["mixed"] if HAS_MIXED else [])])
def test_swapped_columns_and_rows_are_exact(
    kind: str, build: Any, tp: tuple[int, int], sizes: tuple[int, int]
) -> None:
    """One of both modules tells, where the other one is square."""
    options, _ = KINDS[kind]
    swapped = flat(sizes=sizes, swapped=True)
    first, down = (delta.mT for delta in expect_flat(swapped))
    assert_exact(
        Experts(**options, sizes=sizes, tp=tp),
        build(sizes=sizes, swapped=True),
        [part(first, 1, tp, 2), part(down, 2, tp)],
    )


def part(delta: torch.Tensor, dim: int, tp: tuple[int, int], parts: int = 1) -> torch.Tensor:
    """Return a rank's rows or columns of each of a weight's parts."""
    rank, ranks = tp
    return torch.cat([p.chunk(ranks, dim)[rank] for p in delta.chunk(parts, dim)], dim)


@plugin
@pytest.mark.parametrize("sizes", [(64, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("tp", [(0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("kind", EXISTING)
def test_adapters_of_the_same_width_are_exact(
    kind: str, sizes: tuple[int, int], tp: tuple[int, int]
) -> None:
    options, build = KINDS[kind]
    tensors = build(sizes=sizes)
    if kind == "shared":
        first, down = expect_shared(tensors)
    elif "apart" in kind:
        first, down = expect_per_expert(
            tensors, ("up_proj",) if "not" in kind else ("gate_proj", "up_proj")
        )
    else:
        first, down = expect_flat(flat(sizes=sizes))
    expected = [part(first, 1, tp, 1 if "not" in kind else 2), part(down, 2, tp)]
    assert_exact(Experts(**options, sizes=sizes, tp=tp), tensors, expected)


@plugin
@pytest.mark.parametrize("kind", EXISTING)
def test_padding_of_the_hidden_size_makes_no_difference(kind: str) -> None:
    options, build = KINDS[kind]
    assert Experts(**options, padded=(64, 16)).add(build()) == ""
    refuse(Experts(**options, padded=(64, 16)), build(sizes=(64, 16)))


@plugin
@pytest.mark.parametrize(
    ("kind", "architecture", "ranks", "is_exact"),
    [
        ("apart", "Model", 1, True),
        ("3d", "GptOssForCausalLM", 1, True),
        ("3d", "Model", 1, False),
        ("apart", "Model", 2, CUTS_UNPADDED),
        ("3d", "Model", 2, CUTS_UNPADDED),
        ("3d", "GptOssForCausalLM", 2, CUTS_UNPADDED),
    ],
)
def test_padding_of_the_intermediate_size_is_exact_or_refused(
    kind: str, architecture: str, ranks: int, is_exact: bool
) -> None:
    options, build = KINDS[kind]
    tensors, size, allocated = build(), 16 // ranks, 24 // ranks
    for rank in range(ranks):
        tp = (rank, ranks)
        experts = Experts(**options, architecture=architecture, tp=tp, padded=(32, allocated))
        if not is_exact:
            assert f"pads {size} intermediate columns to {allocated}" in refuse(experts, tensors)
            continue
        assert experts.add(tensors) == ""
        first, down = experts.deltas()
        whole = expect_per_expert(tensors) if kind == "apart" else expect_flat(tensors)
        assert torch.equal(down[..., :size], part(whole[1], 2, tp))
        assert not down[..., size:].any()
        if architecture == "Model":
            wanted = torch.zeros_like(first)
            gate, up = part(whole[0], 1, tp, 2).chunk(2, 1)
            wanted[:, :size], wanted[:, allocated : allocated + size] = gate, up
        else:  # rows of gate and up alternate
            wanted = torch.zeros_like(first)
            wanted[:, : 2 * size] = part(whole[0], 1, tp)
        assert torch.equal(first, wanted)


@plugin
@pytest.mark.skipif(not HAS_PATTERNS, reason="no rank_pattern")
def test_rank_of_a_pattern_counts() -> None:
    config = {"rank_pattern": {r".*\.gate_up_proj": RANK // 2, r".*\.down_proj": RANK // 2}}
    tensors = flat(rank=RANK // 2)
    expected = expect_flat(tensors, RANK // 2, scale=4)
    assert_exact(Experts(stacked=True, config=config), tensors, expected)
    assert f"{EXPERTS} experts of rank 2" in refuse(Experts(stacked=True, config=config), flat())
    assert f"{EXPERTS} experts of rank 4" in refuse(Experts(stacked=True), tensors)


@plugin
@pytest.mark.parametrize("kind", ["3d", "apart"])
def test_rank_that_ranks_cannot_divide_is_refused(kind: str) -> None:
    options, build = KINDS[kind]
    error = refuse(Experts(**options, tp=(0, 2), sharded=True), build(rank=3), rank=3)
    assert "--fully-sharded-loras divides its rank 3 by 2 tensor-parallel ranks" in error
    assert Experts(**options, tp=(0, 2)).add(build(rank=3), rank=3) == ""


@plugin
@pytest.mark.skipif(not HAS_SHARED, reason="no shared experts' tensors")
def test_copies_of_shared_matrices_are_equal() -> None:
    tensors = shared()
    copied = tensors | {f".w1.{A}": tensors[f".w1.{A}"].repeat(EXPERTS, 1, 1)}
    assert_exact(Experts(shared=True), copied, expect_shared(tensors))
    copied[f".w1.{A}"][1] += 1
    assert (
        "all experts have the same LoRA-A of gate_proj, and the adapter has different ones"
        in refuse(Experts(shared=True), copied)
    )
    for name, t in (
        (f".w2.{A}", tensors[f".w2.{A}"][: EXPERTS // 2]),
        (f".w3.{A}", tensors[f".w3.{A}"].repeat(2, 1, 1)),
    ):
        error = refuse(Experts(shared=True), tensors | {name: t})
        assert "for a matrix that its experts share, found" in error
    alike = tensors | {f".w1.{B}": tensors[f".w1.{B}"][:1]}
    every = tensors | {f".w1.{B}": alike[f".w1.{B}"].repeat(EXPERTS, 1, 1)}
    assert_exact(Experts(shared=True), alike, expect_shared(every))


RSLORA = {"use_rslora": True}
IS_SCALED_ALIKE = defects.find("experts-without-rslora").affects(vllm.__version__)


@plugin
@pytest.mark.parametrize("gated", [True, False])
def test_rslora_on_experts_apart_is_exact_or_refused(gated: bool) -> None:
    tensors = per_expert(gated)
    experts = Experts(gated=gated, config=RSLORA)
    if IS_SCALED_ALIKE:
        error = refuse(experts, tensors)
        assert "its scaling is 4, as with use_rslora" in error
        assert "scales experts by lora_alpha / r = 2." in error
    else:
        first = ("gate_proj", "up_proj") if gated else ("up_proj",)
        assert_exact(experts, tensors, expect_per_expert(tensors, first, 2 * math.sqrt(RANK)))


@plugin
def test_rslora_is_exact_where_its_scaling_is_used() -> None:
    tensors = per_expert(rank=1)  # both scalings are equal
    experts = Experts(config=RSLORA)
    assert experts.add(tensors, rank=1) == ""
    assert torch.equal(experts.deltas()[1], expect_per_expert(tensors)[1])
    expected = expect_flat(flat(), scale=2 * math.sqrt(RANK))
    assert_exact(Experts(stacked=True, config=RSLORA), flat(), expected)


class TestStock:
    """vLLM without this package. A test fails when upstream has fixed its defect."""

    @pytest.mark.parametrize("kind", EXISTING)
    def test_stock_serves_narrower_experts(self, kind: str) -> None:
        options, build = KINDS[kind]
        experts = Experts(**options)
        assert experts.add(build(sizes=(16, 8))) == ""
        assert all(delta.any() for delta in experts.deltas())

    def test_stock_serves_swapped_columns_and_rows(self) -> None:
        experts = Experts(stacked=True, sizes=(64, 16), tp=(0, 2))
        assert experts.add(flat(sizes=(64, 16), swapped=True)) == ""
        assert all(delta.any() for delta in experts.deltas())

    def test_stock_scales_experts_apart_alike(self) -> None:
        tensors = per_expert()
        experts = Experts(config=RSLORA)
        assert experts.add(tensors) == ""
        right = expect_per_expert(tensors, scale=2 * math.sqrt(RANK))
        is_right = all(map(torch.equal, experts.deltas(), right))
        assert is_right != IS_SCALED_ALIKE
