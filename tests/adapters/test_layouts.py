"""Tests of modules that are finer or coarser than the model's, against dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nway_lora.adapters.layouts import fold_parts, split_fused
from vllm_nway_lora.adapters.target import LayoutError, Pair, Part, Target

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def pair(rows: int, columns: int, rank: int, scaling: float = 1.0) -> Pair:
    """Return a pair of small integers, whose products float32 holds exactly."""
    a = torch.randint(-3, 4, (rank, columns)).float()
    return Pair(a, torch.randint(-3, 4, (rows, rank)).float(), scaling)


def delta(pair: Pair) -> torch.Tensor:
    return pair.scaling * pair.b @ pair.a


@given(
    sizes=SIZES, columns=st.integers(1, 6), rank=st.integers(1, 5), scaling=st.sampled_from([1, 2])
)
def test_a_fused_tensor_is_split_into_its_modules(
    sizes: list[int], columns: int, rank: int, scaling: float
) -> None:
    modules = tuple(f"m.{number}" for number in range(len(sizes)))
    target = Target(dict(zip(modules, sizes, strict=True)), fused={"m.fused": modules})
    fused = pair(sum(sizes), columns, rank, scaling)
    found, rules = split_fused({"m.fused": fused, "other": fused}, target)
    assert list(found) == ["other", *modules]
    assert torch.equal(torch.cat([delta(found[module]) for module in modules]), delta(fused))
    assert all(found[module].a is fused.a for module in modules)
    assert len(rules) == 1


@given(
    sizes=SIZES,
    columns=st.integers(1, 6),
    ranks=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    present=st.sets(st.integers(0, 4), min_size=1),
    scalings=st.sampled_from([(1.0,) * 5, (2.0,) * 5, (1.0, 2.0, 0.5, 4.0, 1.0)]),
)
def test_parts_are_folded_into_their_module(
    sizes: list[int],
    columns: int,
    ranks: list[int],
    present: set[int],
    scalings: tuple[float, ...],
) -> None:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = {
        f"m.{number}": Part("m.all", start, start + size)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    pairs = {
        f"m.{number}": pair(size, columns, ranks[number], scalings[number])
        for number, size in enumerate(sizes)
        if number in present
    }
    if not pairs:
        return
    found, rules = fold_parts(pairs, Target({"m.all": sum(sizes)}, parts=parts))
    expected = torch.zeros(sum(sizes), columns)
    for name, own in pairs.items():
        expected[parts[name].start : parts[name].stop] = delta(own)
    assert list(found) == ["m.all"]
    assert torch.equal(delta(found["m.all"]), expected)
    effective = [own for own in pairs.values() if own.b.any()] or list(pairs.values())[:1]
    rank = sum(len(own.a) for own in effective)  # a part without effect does not raise it
    assert found["m.all"].b.shape == (sum(sizes), rank)
    assert rules == [f"{', '.join(name[2:] for name in pairs)} folded into all of rank {rank}"]


def test_parts_of_one_scaling_keep_their_values() -> None:
    """The result has the same bits in bfloat16 as the module's own pair."""
    target = Target({"qkv": 4}, parts={"q": Part("qkv", 0, 2), "k": Part("qkv", 2, 4)})
    a, b = torch.randn(1, 3).bfloat16(), torch.randn(2, 1).bfloat16()
    found, _ = fold_parts({"k": Pair(a, b, 0.3), "q": Pair(a, b, 0.3)}, target)
    assert found["qkv"].scaling == 0.3
    assert torch.equal(found["qkv"].b, torch.block_diag(b, b))
    assert torch.equal(found["qkv"].a, torch.cat([a, a]))


def test_parts_of_other_scalings_are_rounded_once() -> None:
    target = Target({"qk": 4}, parts={"q": Part("qk", 0, 2), "k": Part("qk", 2, 4)})
    a, b = torch.randn(1, 3).bfloat16(), torch.randn(2, 1).bfloat16()
    found, _ = fold_parts({"q": Pair(a, b, 5 / 6), "k": Pair(a, b, 16 / 6)}, target)
    assert found["qk"].scaling == 1.0
    assert torch.equal(found["qk"].b[:2, :1], (b.double() * 5 / 6).bfloat16())
    assert torch.equal(found["qk"].b[2:, 1:], (b.double() * 16 / 6).bfloat16())
    none, _ = fold_parts({"q": Pair(a, b, 0.0), "k": Pair(a, b, 1.0)}, target)
    assert not none["qk"].b[:2].any()


FUSED = Target({"q": 4, "k": 2}, fused={"qk": ("q", "k")})
PARTS = Target({"qk": 6}, parts={"q": Part("qk", 0, 4), "k": Part("qk", 4, 6)})


def test_a_fused_tensor_of_other_rows_is_refused() -> None:
    with pytest.raises(LayoutError) as raised:
        split_fused({"qk": pair(5, 3, 1)}, FUSED)
    assert str(raised.value) == (
        "module qk is the fused layer of q, k: expected a LoRA-B of 4 + 2 = 6 rows, found (5, 1)"
    )


def test_a_fused_tensor_beside_its_module_is_refused() -> None:
    with pytest.raises(LayoutError, match="both module k and qk have LoRA on the same rows"):
        split_fused({"qk": pair(6, 3, 1), "k": pair(2, 3, 1)}, FUSED)


@pytest.mark.parametrize(
    "pairs",
    [{"q": pair(3, 3, 1)}, {"q": pair(4, 3, 1), "k": pair(2, 2, 1)}],
    ids=["rows", "columns"],
)
def test_a_part_of_other_sizes_is_refused(pairs: dict[str, Pair]) -> None:
    with pytest.raises(LayoutError, match=r"module q is a part of qk: expected a LoRA-B of 4 rows"):
        fold_parts(pairs, PARTS)


def test_a_part_beside_its_module_is_refused() -> None:
    with pytest.raises(LayoutError, match="both module qk and q have LoRA on the same rows"):
        fold_parts({"q": pair(4, 3, 1), "qk": pair(6, 3, 1)}, PARTS)
