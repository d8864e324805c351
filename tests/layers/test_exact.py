"""Every fused layer equals dense arithmetic bit by bit, for every subset of adapted modules."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from support import layers
from support.layers import Case, Fusion
from support.ranks import Ranks

QKVZ = Fusion("in_proj_qkvz", (16, 16, 32, 32), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
FUSIONS = [
    QKVZ,
    Fusion("in_proj_qkvg", (16, 8, 24, 8), tuple("qkvg"), ((0,), (1,), (2,), (3,))),
    Fusion("in_proj", (16, 16, 8, 8, 4), ("in_proj",), ((0, 1, 2, 3, 4),)),
    Fusion("interleaved_qkvz", (48,), ("interleaved_qkvz",), ((0,),)),
    Fusion("unequal", (16, 8), ("unequal",), ((0, 1),)),
    Fusion("in_proj_qkvz", QKVZ.sizes, QKVZ.modules, QKVZ.groups, disable_tp=True),
    Fusion("in_proj_qkvz", QKVZ.sizes, QKVZ.modules, QKVZ.groups, bias=True),
]


def name(fusion: Fusion) -> str:
    marks = "-replicated" * fusion.disable_tp + "-bias" * fusion.bias
    return f"{fusion.name}-{len(fusion.modules)}of{len(fusion.sizes)}{marks}"


def subsets(fusion: Fusion) -> list[tuple[int, ...]]:
    modules = range(len(fusion.modules))
    return [s for size in modules for s in combinations(modules, size + 1)]


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=name)
def test_equals_dense_arithmetic(ranks: Ranks, fusion: Fusion, fully_sharded: bool) -> None:
    todo = subsets(fusion)
    while todo:
        # One slot stays empty: on CPU, vLLM until 0.32.0 applies the last slot to tokens without LoRA.
        batch, todo = todo[: layers.MAX_LORAS - 1], todo[layers.MAX_LORAS - 1 :]
        for prefill in (True, False):
            case = Case(fusion, tuple(batch), fully_sharded=fully_sharded, prefill=prefill)
            results = ranks.run(layers.run, case)
            assert {result.layer_class for result in results} == {"NWayLinearWithLoRA"}
            output = layers.assemble(fusion, [result.output for result in results])
            torch.testing.assert_close(output, layers.dense(case), rtol=0, atol=0)
