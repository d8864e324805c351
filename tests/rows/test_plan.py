"""The plan against a dense reference: any outputs, grouping, ranks and missing modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nway_lora.fusions import KNOWN, outputs_by_module
from vllm_nway_lora.plan import (
    FusionPlan,
    Output,
    PlanError,
    build_plan,
    partition_by_rows,
    refuse_all,
)


def shard(sizes: list[int], replicated: list[bool], tp: int, rank: int) -> list[Output]:
    """Lay outputs out as vLLM does: split evenly over the ranks, or whole on each of them."""
    parts = [
        torch.arange(n) if whole else torch.arange(n).chunk(tp)[rank]
        for n, whole in zip(sizes, replicated, strict=True)
    ]
    width = sum(map(len, parts))
    outputs, start = [], 0
    for n, part in zip(sizes, parts, strict=True):
        column = torch.full((width,), -1)
        column[start : start + len(part)] = part
        outputs.append(Output(n, column))
        start += len(part)
    return outputs


@st.composite
def fusions(draw: st.DrawFn) -> tuple[int, list[int], list[bool], list[list[int]]]:
    """Draw tensor-parallel size, outputs' rows, which are replicated, and outputs per module."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    sizes = [tp * n for n in draw(st.lists(st.integers(1, 6), min_size=1, max_size=7))]
    replicated = [draw(st.booleans()) for _ in sizes]
    n = len(sizes)
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    bounds = [0, *cuts, n]
    return tp, sizes, replicated, [list(range(a, b)) for a, b in zip(bounds, bounds[1:])]


@given(fusions(), st.data())
def test_every_rank_gets_the_dense_rows(
    fusion: tuple[int, list[int], list[bool], list[list[int]]], data: st.DataObject
) -> None:
    tp, sizes, replicated, groups = fusion
    modules = [f"m{i}" for i in range(len(groups))]
    rows = [sum(sizes[o] for o in group) for group in groups]
    adapted = data.draw(st.sets(st.sampled_from(range(len(groups)))))
    # Row r of the whole projection holds r + 1 where its module is adapted, else 0.
    whole = torch.arange(1, sum(sizes) + 1)
    lora_b = list(whole.split(rows))
    wanted = torch.cat([b if m in adapted else b * 0 for m, b in enumerate(lora_b)])
    for rank in range(tp):
        outputs = shard(sizes, replicated, tp, rank)
        plan = build_plan("fused", modules, groups, outputs)
        assert [s.module for s in plan.slices] == modules
        assert [s.rows for s in plan.slices] == rows
        got = write(plan, [b if m in adapted else None for m, b in enumerate(lora_b)])
        first_rows = [sum(sizes[:o]) for o in range(len(sizes))]
        expected = torch.cat(
            [wanted[o.column[o.column >= 0] + f] for o, f in zip(outputs, first_rows)]
        )
        assert torch.equal(got, expected)


def write(plan: FusionPlan, lora_b: list[torch.Tensor | None]) -> torch.Tensor:
    """Fill this rank's output the way the layer fills its slices."""
    slices = [torch.zeros(s.width, dtype=torch.int64) for s in plan.slices]
    for module, number, rows in plan.assign([None if b is None else len(b) for b in lora_b]):
        b = lora_b[module]
        assert b is not None
        slices[number][plan.slices[number].run] = plan.slices[number].take(b[rows])
    return torch.cat(slices)


@given(fusions(), st.data())
def test_by_rows_is_the_true_grouping_or_an_error(
    fusion: tuple[int, list[int], list[bool], list[list[int]]], data: st.DataObject
) -> None:
    """Where names do not tell, an adapter is placed as it would be if they did, or refused."""
    tp, sizes, replicated, groups = fusion
    modules = [f"m{i}" for i in range(len(groups))]
    adapted = data.draw(st.sets(st.sampled_from(range(len(groups)))))
    rows = [sum(sizes[o] for o in group) for group in groups]
    lora_b = [torch.randperm(r) + 1 if m in adapted else None for m, r in enumerate(rows)]
    outputs = shard(sizes, replicated, tp, rank=tp - 1)
    try:
        got = write(build_plan("fused", modules, None, outputs), lora_b)
    except PlanError as error:
        assert "more than one does" in str(error)  # the true grouping always fits
        return
    assert torch.equal(got, write(build_plan("fused", modules, groups, outputs), lora_b))


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=4),
)
def test_partition_agrees_with_trying_every_split(sizes: list[int], rows: list[int | None]) -> None:
    def splits(first: int, modules: int) -> list[list[range]]:
        if not modules:
            return [[]] if first == len(sizes) else []
        return [
            [range(first, last), *rest]
            for last in range(first + 1, len(sizes) + 1)
            for rest in splits(last, modules - 1)
        ]

    fits = [
        split
        for split in splits(0, len(rows))
        if all(n is None or sum(sizes[o] for o in run) == n for run, n in zip(split, rows))
    ]
    placed = {tuple(r for r, n in zip(split, rows) if n is not None) for split in fits}
    names = [f"m{i}" for i in range(len(rows))]
    if len(placed) == 1:
        assert partition_by_rows("fused", sizes, names, rows) in fits
    else:
        with pytest.raises(PlanError, match="more than one does" if placed else "none does"):
            partition_by_rows("fused", sizes, names, rows)


class TestReviewersPoints:
    """One test per point that reviewers raised of the upstream change that this grew from.

    vllm-project/vllm#37019: exact sums, an argument for uniqueness, strict lengths, no silent
    padding, a missing module that counts as one slice.
    """

    qkvz = KNOWN["in_proj_qkvz"]
    sizes = (4, 4, 8, 8)

    def plan(self, tp: int = 1, rank: int = 0) -> FusionPlan:
        outputs = shard(list(self.sizes), [False] * 4, tp, rank)
        groups = outputs_by_module("in_proj_qkvz", list(self.qkvz), 4)
        return build_plan("in_proj_qkvz", list(self.qkvz), groups, outputs)

    @pytest.mark.parametrize("rows", [15, 17, 8, 24, 0])
    def test_sums_are_exact(self, rows: int) -> None:
        with pytest.raises(PlanError, match=f"expected LoRA-B with 16 rows, found {rows}"):
            list(self.plan().assign([rows, 8]))

    def test_equal_rows_are_not_placed_greedily(self) -> None:
        # v and z are both 8 rows wide: a z-only adapter must not land on v.
        [(module, number, rows)] = self.plan().assign([None, 8])
        assert (module, number, rows) == (1, 1, slice(0, 8))
        assert write(self.plan(), [None, torch.ones(8)]).tolist() == [0] * 16 + [1] * 8

    def test_what_fits_twice_is_an_error_that_shows_both(self) -> None:
        with pytest.raises(PlanError) as error:
            partition_by_rows("fused", [4, 4, 4, 4], ["x", "y", "z"], [None, 4, None])
        assert "[[0], [1], [2, 3]] and [[0, 1], [2], [3]]" in str(error.value)
        assert "x: not adapted, y: 4 rows, z: not adapted" in str(error.value)

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_module_keeps_its_place(self, missing: int) -> None:
        sizes, groups = [2, 3, 4, 5], [[0], [1, 2], [3]]
        rows: list[int | None] = [2, 7, 5]
        rows[missing] = None
        outputs = shard(sizes, [False] * 4, 1, 0)
        for known in (groups, None):
            plan = build_plan("fused", ["x", "y", "z"], known, outputs)
            b = [None if n is None else torch.full((n,), n) for n in rows]
            expected = [n or 0 for n, size in zip(rows, [2, 7, 5]) for _ in range(size)]
            assert write(plan, b).tolist() == expected

    @pytest.mark.parametrize("count", [0, 1, 3, 4])
    def test_lengths_are_strict(self, count: int) -> None:
        with pytest.raises(PlanError, match=f"2 modules .* was given for {count}"):
            list(self.plan().assign([8] * count))

    @pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
    def test_nothing_is_padded(self, tp: int, rank: int) -> None:
        plan = self.plan(tp, rank)
        assert [len(s.local) for s in plan.slices] == [16 // tp, 8 // tp]
        assert [s.width for s in plan.slices] == [16 // tp, 8 // tp]
        for rows in (16 // tp - 1, 16 // tp + 1):
            with pytest.raises(PlanError):
                list(plan.assign([rows, None]))


def test_columns_that_no_module_covers_stay_in_a_slice() -> None:
    """Kernels write slices without gaps, so padding belongs to a slice and is left alone."""
    column = {name: torch.full((8,), -1) for name in "xy"}
    column["x"][1:3] = torch.arange(2)
    column["y"][4:7] = torch.arange(3)
    plan = build_plan(
        "fused", ["x", "y"], [[0], [1]], [Output(2, column["x"]), Output(3, column["y"])]
    )
    assert sum(s.width for s in plan.slices) == 8
    assert write(plan, [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]).tolist() == [
        0, 1, 2, 0, 3, 4, 5, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([[0, -1, 1, -1], [-1, 0, -1, 1]], "as one contiguous run"),
        ([[-1, -1, 0, 1], [0, 1, -1, -1]], "overlap or are out of order"),
        ([[0, 1, 2, 3], [0, 1, -1, -1]], "overlap or are out of order"),
        ([[-1] * 4, [0, 1, 2, 3]], "as one contiguous run"),
    ],
)
def test_a_layout_that_is_no_run_is_an_error(columns: list[list[int]], words: str) -> None:
    outputs = [Output(2, torch.tensor(column)) for column in columns]
    with pytest.raises(PlanError, match=words):
        build_plan("fused", ["x", "y"], [[0], [1]], outputs)


@pytest.mark.parametrize("groups", [[[0], [2]], [[1], [0, 2]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_groups_must_cover_each_output_once_and_in_order(groups: list[list[int]]) -> None:
    outputs = shard([2, 2, 2], [False] * 3, 1, 0)
    with pytest.raises(PlanError, match="not each of the 3 outputs once and in order"):
        build_plan("fused", [f"m{i}" for i in range(len(groups))], groups, outputs)


def test_a_refusing_plan_refuses_with_its_reason() -> None:
    plan = refuse_all("fused", ["x", "y", "z"], 8, "because")
    assert sum(s.width for s in plan.slices) == 8
    assert [s.module for s in plan.slices] == ["x", "y", "z"]
    with pytest.raises(PlanError, match="^module z of fused: because$"):
        list(plan.assign([None, None, 3]))


def test_a_plan_may_refuse_one_module_and_place_the_others() -> None:
    outputs = [
        Output(4, torch.tensor([0, 1, 2, 3, -1, -1])),
        Output(2, torch.tensor([-1] * 4 + [0, 1])),
    ]
    plan = build_plan("fused", ["x", "y"], [[0], [1]], outputs)
    plan = dataclasses.replace(plan, refusals={"y": "because"})
    assert list(plan.assign([4, None])) == [(0, 0, slice(0, 4))]
    for rows in ([None, 2], [4, 2]):
        with pytest.raises(PlanError, match="^module y of fused: because$"):
            list(plan.assign(rows))


@pytest.mark.parametrize(
    ("fused", "modules", "outputs", "expected"),
    [
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"], 4, ((0, 1, 2), (3,))),
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"], 5, None),
        ("in_proj_qkvz", ["in_proj_qkvz"], 1, ((0,),)),
        ("in_proj_qkvz", ["q", "k", "v", "z"], 4, ((0,), (1,), (2,), (3,))),
        ("in_proj", ["in_proj"], 5, ((0, 1, 2, 3, 4),)),
        ("unknown", ["x", "y"], 3, None),
    ],
)
def test_outputs_by_module(
    fused: str, modules: list[str], outputs: int, expected: tuple[tuple[int, ...], ...] | None
) -> None:
    assert outputs_by_module(fused, modules, outputs) == expected


@pytest.mark.parametrize("fused", KNOWN)
def test_known_fusions_cover_their_outputs_in_order(fused: str) -> None:
    outputs = [output for group in KNOWN[fused].values() for output in group]
    assert outputs == list(range(len(outputs)))
