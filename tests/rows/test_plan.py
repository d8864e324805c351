"""The plan against a dense reference: any outputs, grouping, ranks and missing modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.plan import (
    FusionPlan,
    Output,
    build_plan,
    build_traced_plan,
    refuse_all,
)

#: Qwen3.5's fused projection: the outputs of each module.
QKVZ = {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,)}


def shard(sizes: list[int], replicated: list[bool], tp: int, rank: int) -> list[Output]:
    """Return outputs as vLLM shards them: split evenly over the ranks, or whole on each of them."""
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


@settings(deadline=None)  # on a busy machine, a draw can take longer than the default of 200 ms
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
    """Fill this rank's output as the layer fills its slices."""
    validate(plan, [None if b is None else len(b) for b in lora_b])
    slices = [torch.zeros(s.width, dtype=torch.int64) for s in plan.slices]
    for part, columns, b in zip(plan.slices, slices, lora_b):
        if b is not None:
            columns[part.run] = part.take(b)
    return torch.cat(slices)


def validate(plan: FusionPlan, rows: list[int | None]) -> None:
    """Validate an adapter of LoRA rank 1 whose modules have these numbers of rows."""
    plan.validate(
        [None if n is None else torch.zeros(1, 5) for n in rows],
        [None if n is None else torch.zeros(n, 1) for n in rows],
        columns=5,
        max_rank=1,
    )


class TestReviewersPoints:
    """One test per point of the reviewers of vllm-project/vllm#37019, the origin of this package.

    Exact sums, uniqueness, strict lengths, no silent padding, one slice for a missing module.
    """

    sizes = (4, 4, 8, 8)

    def plan(self, tp: int = 1, rank: int = 0) -> FusionPlan:
        outputs = shard(list(self.sizes), [False] * 4, tp, rank)
        return build_plan("in_proj_qkvz", list(QKVZ), list(QKVZ.values()), outputs)

    @pytest.mark.parametrize("rows", [15, 17, 8, 24, 0])
    def test_wrong_row_count_is_refused(self, rows: int) -> None:
        words = rf"expected LoRA-A \(r, 5\) and LoRA-B \(16, r\), found \(1, 5\) and \({rows}, 1\)"
        with pytest.raises(PlanError, match=words):
            validate(self.plan(), [rows, 8])

    def test_equal_rows_are_not_placed_greedily(self) -> None:
        # v and z are both 8 rows wide: a z-only adapter must not land on v.
        assert write(self.plan(), [None, torch.ones(8)]).tolist() == [0] * 16 + [1] * 8

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_missing_module_keeps_its_slice(self, missing: int) -> None:
        sizes, groups = [2, 3, 4, 5], [[0], [1, 2], [3]]
        rows: list[int | None] = [2, 7, 5]
        rows[missing] = None
        outputs = shard(sizes, [False] * 4, 1, 0)
        plan = build_plan("fused", ["x", "y", "z"], groups, outputs)
        b = [None if n is None else torch.full((n,), n) for n in rows]
        expected = [n or 0 for n, size in zip(rows, [2, 7, 5]) for _ in range(size)]
        assert write(plan, b).tolist() == expected

    @pytest.mark.parametrize("count", [0, 1, 3, 4])
    def test_wrong_number_of_modules_is_refused(self, count: int) -> None:
        words = f"2 modules .* found {count} LoRA-A tensors and {count} LoRA-B tensors"
        with pytest.raises(PlanError, match=words):
            validate(self.plan(), [8] * count)

    @pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
    def test_rows_of_one_rank_are_not_padded(self, tp: int, rank: int) -> None:
        plan = self.plan(tp, rank)
        assert [len(s.local) for s in plan.slices] == [16 // tp, 8 // tp]
        assert [s.width for s in plan.slices] == [16 // tp, 8 // tp]
        for rows in (16 // tp - 1, 16 // tp + 1):
            with pytest.raises(PlanError):
                validate(plan, [rows, None])


def test_columns_of_no_module_belong_to_a_slice() -> None:
    """Kernels write slices without gaps, so padding belongs to a slice, and nothing writes it."""
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
def test_layout_without_contiguous_runs_raises_error(columns: list[list[int]], words: str) -> None:
    outputs = [Output(2, torch.tensor(column)) for column in columns]
    with pytest.raises(PlanError, match=words):
        build_plan("fused", ["x", "y"], [[0], [1]], outputs)


@pytest.mark.parametrize("groups", [[[0], [2]], [[1], [0, 2]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_groups_must_cover_each_output_once_and_in_order(groups: list[list[int]]) -> None:
    outputs = shard([2, 2, 2], [False] * 3, 1, 0)
    with pytest.raises(PlanError, match="not each of the 3 outputs once and in order"):
        build_plan("fused", [f"m{i}" for i in range(len(groups))], groups, outputs)


def test_refusing_plan_raises_its_reason() -> None:
    plan = refuse_all("fused", ["x", "y", "z"], 8, "because")
    assert sum(s.width for s in plan.slices) == 8
    assert [s.module for s in plan.slices] == ["x", "y", "z"]
    with pytest.raises(PlanError, match="^module z of fused: because$"):
        validate(plan, [None, None, 3])


def test_plan_can_refuse_one_module_and_place_the_others() -> None:
    outputs = [
        Output(4, torch.tensor([0, 1, 2, 3, -1, -1])),
        Output(2, torch.tensor([-1] * 4 + [0, 1])),
    ]
    plan = build_plan("fused", ["x", "y"], [[0], [1]], outputs)
    plan = dataclasses.replace(plan, refusals={"y": "because"})
    validate(plan, [4, None])
    for rows in ([None, 2], [4, 2]):
        with pytest.raises(PlanError, match="^module y of fused: because$"):
            validate(plan, rows)


def hold(*rows: int, size: int = 4, columns: int = 2) -> Held:
    return Held(size, torch.tensor(rows), torch.arange(columns))


def describe(plan: FusionPlan) -> list[tuple[str, int, int, list[int]]]:
    return [(part.module, part.width, part.offset, part.local.tolist()) for part in plan.slices]


def test_traced_plan_follows_the_order_of_the_rows() -> None:
    held = {"q": hold(2, 3, -1, -1, -1), "k": hold(-1, -1, 1, 0, -1)}
    plan = build_traced_plan("qk", ["q", "k"], held)
    assert describe(plan) == [("q", 2, 0, [2, 3]), ("k", 3, 0, [1, 0])]
    assert plan.sources == ()


def test_region_of_a_module_without_a_weight_is_filled_by_another() -> None:
    held = {"q": hold(0, 1, -1, -1, -1, -1), "k": hold(-1, -1, 0, 1, 0, 1, size=2)}
    regions = [slice(0, 2), slice(2, 4), slice(4, 6)]
    plan = build_traced_plan("qkv", ["q", "k", "v"], held, regions)
    assert describe(plan)[1:] == [("k", 2, 0, [0, 1]), ("v", 2, 0, [0, 1])]
    assert [plan.source(number) for number in range(3)] == [0, 1, 1]
    a, b = torch.ones(1, 2), torch.ones(2, 1)
    plan.validate([None, a, None], [None, b, None], columns=2, max_rank=1)
    with pytest.raises(
        PlanError, match="module v of qkv: a checkpoint has no weight of this module"
    ):
        plan.validate([None, None, a], [None, None, b], columns=2, max_rank=1)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (
            {"x": hold(0, -1, 1, -1), "y": hold(-1, 0, -1, -1)},
            "does not load x into one run of rows",
        ),
        ({"x": hold(0, 1, -1, -1), "y": hold(-1, 0, 1, -1)}, "loads y into the rows of x"),
        ({"x": hold(-1, -1, 0, 1), "y": hold(0, 1, -1, -1)}, "overlap others or are out of order"),
        ({"x": hold(0, 1, -1, -1)}, "does not load y into one run of rows"),
    ],
)
def test_trace_that_slices_cannot_describe_raises_error(held: dict[str, Held], words: str) -> None:
    with pytest.raises(PlanError, match=f"fused: .*{words}"):
        build_traced_plan("fused", ["x", "y"], held)


def test_reordered_columns_raise_error() -> None:
    held = {"x": Held(2, torch.arange(2), torch.tensor([1, 0]))}
    with pytest.raises(PlanError, match="its model reorders the columns of x"):
        build_traced_plan("fused", ["x"], held)


def test_rows_outside_of_every_region_raise_error() -> None:
    held = {"x": hold(0, 1, 2, -1), "y": hold(-1, -1, -1, 0)}
    with pytest.raises(PlanError, match="its model loads x outside of the modules' rows"):
        build_traced_plan("fused", ["x", "y"], held, [slice(0, 2), slice(3, 4)])
