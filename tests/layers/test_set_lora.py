"""``set_lora`` takes exactly the tensors that fit, and writes nothing when it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import layers
from support.layers import INPUT_SIZE, Case, Fusion
from support.ranks import Ranks

QKVZ = Fusion("in_proj_qkvz", (16, 16, 32, 32), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
UNLISTED = Fusion("unlisted", (8, 8, 8, 8), ("x", "y", "z"), ((0, 1), (2,), (3,)))
ROWS_QKV, ROWS_Z, RANK = 64, 32, 4


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


A, QKV_B, Z_B = ones(RANK, INPUT_SIZE), ones(ROWS_QKV, RANK), ones(ROWS_Z, RANK)

MISFITS = {
    "too few rows": ([A, A], [ones(ROWS_QKV - 1, RANK), Z_B], "expected LoRA-B with 64 rows, found 63"),
    "too many rows": ([None, A], [None, ones(ROWS_Z + 4, RANK)], "expected LoRA-B with 32 rows, found 36"),
    "rows of the wrong module": ([A, None], [Z_B, None], "module in_proj_qkv of in_proj_qkvz: expected"),
    "one tensor for both": (A, ones(ROWS_QKV + ROWS_Z, RANK), "2 modules (in_proj_qkv, in_proj_z)"),
    "three modules": ([A, A, A], [QKV_B, Z_B, Z_B], "but LoRA-B was given for 3"),
    "no B": ([A, A], [QKV_B, None], "in_proj_z has LoRA-A but no LoRA-B"),
    "no A": ([None, A], [QKV_B, Z_B], "in_proj_qkv has LoRA-B but no LoRA-A"),
    "ranks differ": ([A, None], [ones(ROWS_QKV, RANK + 1), None], "found (4, 32) and (64, 5)"),
    "rank too large": ([ones(9, INPUT_SIZE), None], [ones(ROWS_QKV, 9), None], "r at most 8"),
    "wrong input": ([ones(RANK, INPUT_SIZE + 1), None], [QKV_B, None], "shape (r, 32)"),
    "1-D": ([ones(INPUT_SIZE), None], [ones(ROWS_QKV), None], "found (32,) and (64,)"),
    "lists differ": ([A], [QKV_B, Z_B], "1 LoRA-A tensors but 2 LoRA-B tensors"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_refuses_and_writes_nothing(ranks: Ranks, misfit: str) -> None:
    lora_a, lora_b, words = MISFITS[misfit]
    for message, unchanged in ranks.run(layers.try_set, QKVZ, lora_a, lora_b):
        assert unchanged
        assert words in message
        assert "model.layers.0.mixer.in_proj_qkvz" in message


def test_refuses_rows_of_one_rank_only(ranks: Ranks) -> None:
    local = ones(ROWS_Z // ranks.size, RANK)
    for message, unchanged in ranks.run(layers.try_set, QKVZ, [None, A], [None, local]):
        assert unchanged == (ranks.size > 1)
        assert ("expected LoRA-B with 32 rows" in message) == (ranks.size > 1)


def test_places_unlisted_modules_by_rows_where_only_one_way_fits(ranks: Ranks) -> None:
    cases = [
        ({"x": 8, "y": 16}, ""),
        ({"y": 8}, "more than one does: [[0], [1], [2, 3]] and [[0, 1], [2], [3]]"),
        ({"y": 12}, "but none does"),
        ({"x": 8, "y": 8, "z": 8}, "but none does"),
    ]
    for rows, words in cases:
        lora_b = [ones(rows[m], RANK) if m in rows else None for m in UNLISTED.modules]
        lora_a = [None if b is None else A for b in lora_b]
        for message, unchanged in ranks.run(layers.try_set, UNLISTED, lora_a, lora_b):
            assert unchanged == bool(words)
            assert words in message


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("modules", [(0,), (1,), (0, 1)], ids=str)
def test_leaves_nothing_of_the_adapter_before(
    ranks: Ranks, modules: tuple[int, ...], rank: int, fully_sharded: bool
) -> None:
    case = Case(QKVZ, (modules,), rank, fully_sharded)
    assert all(ranks.run(layers.set_in_turn, case))


@pytest.mark.parametrize("fusion", [QKVZ, UNLISTED], ids=lambda fusion: fusion.name)
def test_takes_the_dummies_of_the_warm_up(ranks: Ranks, fusion: Fusion) -> None:
    for message in ranks.run(layers.warm_up, fusion):
        assert not message


def shapes(*good: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Draw the good shape, none, one near it, or any."""
    near = st.tuples(*(st.sampled_from([n, n - 1, n + 1, n // 2, 2 * n, 0]) for n in good))
    other = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    return st.one_of(st.just(good), st.just(good), st.none(), near, other)


@st.composite
def adapters(draw: st.DrawFn) -> list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
    rank = draw(st.sampled_from([RANK, 1, layers.MAX_RANK, layers.MAX_RANK + 1]))
    pairs = [
        (draw(shapes(rank, INPUT_SIZE)), draw(shapes(rows, rank))) for rows in (ROWS_QKV, ROWS_Z)
    ]
    return pairs + draw(
        st.lists(st.just(pairs[0]), max_size=1) if draw(st.booleans()) else st.just([])
    )


def fits(pairs: list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]) -> bool:
    return len(pairs) == 2 and all(
        a is b is None
        or (a == ((b or (0, -1))[-1], INPUT_SIZE) and b == (rows, a[0]) and a[0] <= layers.MAX_RANK)
        for (a, b), rows in zip(pairs, (ROWS_QKV, ROWS_Z))
    )


@given(pairs=adapters())
@settings(max_examples=200, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_shapes_are_taken_or_refused(
    ranks: Ranks, pairs: list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
) -> None:
    lora_a, lora_b = ([half and ones(*half) for half in halves] for halves in zip(*pairs))
    # A number alone is a tensor too.
    for tensors, halves in ((lora_a, [a for a, _ in pairs]), (lora_b, [b for _, b in pairs])):
        tensors[:] = [ones() if half == () else t for t, half in zip(tensors, halves)]
    for message, unchanged in ranks.run(layers.try_set, QKVZ, lora_a, lora_b):
        assert bool(message) == (not fits(pairs)), message
        assert unchanged == bool(message)
