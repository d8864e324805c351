"""``set_lora`` writes tensors that fit, and writes nothing if it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import layers, slots
from support.layers import INPUT_SIZE, Case, Fusion
from support.ranks import Ranks

QKVZ = Fusion("in_proj_qkvz", (16, 16, 32, 32), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
UNKNOWN = Fusion("unknown", (8, 8, 8, 8), ("x", "y", "z"), ((0, 1), (2,), (3,)))
ROWS_QKV, ROWS_Z, RANK = 64, 32, 4


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


A, QKV_B, Z_B = ones(RANK, INPUT_SIZE), ones(ROWS_QKV, RANK), ones(ROWS_Z, RANK)

MISFITS = {
    "too few rows": ([A, A], [ones(ROWS_QKV - 1, RANK), Z_B], "LoRA-A (r, 32) and LoRA-B (64, r), found (4, 32) and (63, 4)"),
    "too many rows": ([None, A], [None, ones(ROWS_Z + 4, RANK)], "LoRA-A (r, 32) and LoRA-B (32, r), found (4, 32) and (36, 4)"),
    "rows of the wrong module": ([A, None], [Z_B, None], "module in_proj_qkv of in_proj_qkvz: expected"),
    "one tensor for both": (A, ones(ROWS_QKV + ROWS_Z, RANK), "2 modules (in_proj_qkv, in_proj_z)"),
    "three modules": ([A, A, A], [QKV_B, Z_B, Z_B], "found 3 LoRA-A tensors and 3 LoRA-B tensors"),
    "no B": ([A, A], [QKV_B, None], "module in_proj_z of in_proj_qkvz: it has LoRA-A but no LoRA-B"),
    "no A": ([None, A], [QKV_B, Z_B], "module in_proj_qkv of in_proj_qkvz: it has LoRA-B but no LoRA-A"),
    "ranks differ": ([A, None], [ones(ROWS_QKV, RANK + 1), None], "the ranks of LoRA-A (4, 32) and LoRA-B (64, 5) differ"),
    "rank too large": ([ones(9, INPUT_SIZE), None], [ones(ROWS_QKV, 9), None], "its rank 9 is above --max-lora-rank 8"),
    "wrong input": ([ones(RANK, INPUT_SIZE + 1), None], [QKV_B, None], "expected LoRA-A (r, 32) and LoRA-B (64, r), found (4, 33) and (64, 4)"),
    "1-D": ([ones(INPUT_SIZE), None], [ones(ROWS_QKV), None], "expected two-dimensional tensors, found LoRA-A (32,) and LoRA-B (64,)"),
    "B of rank 0": ([A, A], [ones(ROWS_QKV, 0), ones(ROWS_Z, 0)], "the ranks of LoRA-A (4, 32) and LoRA-B (64, 0) differ"),
    "lists differ": ([A], [QKV_B, Z_B], "found 1 LoRA-A tensors and 2 LoRA-B tensors"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_set_lora_refuses_misfit_and_writes_nothing(ranks: Ranks, misfit: str) -> None:
    lora_a, lora_b, words = MISFITS[misfit]
    for message, unchanged in ranks.run(slots.try_set, QKVZ, lora_a, lora_b):
        assert unchanged
        assert words in message
        assert "model.layers.0.mixer.in_proj_qkvz" in message


def test_set_lora_refuses_rows_of_one_rank_only(ranks: Ranks) -> None:
    local = ones(ROWS_Z // ranks.size, RANK)
    for message, unchanged in ranks.run(slots.try_set, QKVZ, [None, A], [None, local]):
        assert unchanged == (ranks.size > 1)
        assert ("expected LoRA-A (r, 32) and LoRA-B (32, r)" in message) == (ranks.size > 1)


def test_layer_with_unknown_outputs_refuses_every_adapter(ranks: Ranks) -> None:
    lora_b = [ones(UNKNOWN.rows(module), RANK) for module in range(3)]
    for message in ranks.run(slots.set_error, UNKNOWN, [A, A, A], lora_b):
        assert (
            "unknown has 4 outputs and 3 modules (x, y, z), and which outputs each module covers is "
            "not known"
        ) in message


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("modules", [(0,), (1,), (0, 1)], ids=str)
def test_set_lora_leaves_nothing_of_the_earlier_adapter(
    ranks: Ranks, modules: tuple[int, ...], rank: int, fully_sharded: bool
) -> None:
    case = Case(QKVZ, (modules,), rank, fully_sharded)
    assert all(ranks.run(slots.set_in_turn, case))


@pytest.mark.parametrize("fusion", [QKVZ, UNKNOWN], ids=lambda fusion: fusion.name)
def test_set_lora_accepts_the_dummies_of_the_warm_up(ranks: Ranks, fusion: Fusion) -> None:
    for message in ranks.run(slots.warm_up, fusion):
        assert not message


def shapes(*good: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Draw the good shape, None, a similar shape, or any shape."""
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
def test_any_shapes_are_written_or_refused(
    ranks: Ranks, pairs: list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
) -> None:
    lora_a, lora_b = ([half and ones(*half) for half in halves] for halves in zip(*pairs))
    # A tensor may have no dimension.
    for tensors, halves in ((lora_a, [a for a, _ in pairs]), (lora_b, [b for _, b in pairs])):
        tensors[:] = [ones() if half == () else t for t, half in zip(tensors, halves)]
    for message, unchanged in ranks.run(slots.try_set, QKVZ, lora_a, lora_b):
        assert bool(message) == (not fits(pairs)), message
        assert unchanged == bool(message)
