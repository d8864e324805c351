"""What vLLM's own classes do with the same layers: where they are right, and each way they are not.

A test of a defect fails when upstream has mended it: that is the time to retire our answer to it.
"""

from __future__ import annotations

import pytest
import torch
from support import layers
from support.layers import Case, Fusion
from support.ranks import Ranks

QKVZ = Fusion("in_proj_qkvz", (32, 32, 64, 64), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
ONE_OF_ONE = Fusion("in_proj_qkvz", (48,), ("in_proj_qkvz",), ((0,),))
ONE_OF_FIVE = Fusion("in_proj", (16, 16, 8, 8, 4), ("in_proj",), ((0, 1, 2, 3, 4),))
FOUR_OF_FOUR = Fusion("in_proj_qkvg", (8, 8, 8, 8), tuple("qkvg"), ((0,), (1,), (2,), (3,)))
QKV, Z = (0,), (1,)


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_same_bits_from_half_the_slices(ranks: Ranks, fully_sharded: bool, prefill: bool) -> None:
    adapters = ((*QKV, *Z), (*QKV, *Z), QKV)
    case = Case(QKVZ, adapters, fully_sharded=fully_sharded, prefill=prefill)
    ours, theirs = ranks.run(layers.run, case), ranks.run(layers.run, case.stock())
    for mine, stock in zip(ours, theirs, strict=True):
        assert mine.layer_class == "NWayLinearWithLoRA"
        assert stock.layer_class.startswith("MergedColumnParallelLinearWith")
        assert torch.equal(mine.output, stock.output)
        assert (mine.n_slices, stock.n_slices) == (2, 4)
        assert mine.lora_a_bytes * 2 == stock.lora_a_bytes
        assert mine.gathered_columns * 2 == stock.gathered_columns


@pytest.mark.parametrize("modules", [2, 1])
def test_two_equal_outputs_stay_with_vllm(ranks: Ranks, modules: int) -> None:
    groups = ((0,), (1,)) if modules == 2 else ((0, 1),)
    fusion = Fusion("gate_up_proj", (16, 16), ("gate_proj", "up_proj")[:modules], groups)
    case = Case(fusion, ((0,),))
    (ours, *_), (theirs, *_) = ranks.run(layers.run, case), ranks.run(layers.run, case.stock())
    assert ours.layer_class == theirs.layer_class != "NWayLinearWithLoRA"


def test_stock_cannot_load_z_alone(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="ValueError: Cannot determine how to split lora_b"):
        ranks.run(layers.run, Case(QKVZ, (Z,), plugin=False))


@pytest.mark.parametrize("fusion", [ONE_OF_FIVE, FOUR_OF_FOUR], ids=["1of5", "4of4"])
def test_stock_ignores_three_outputs_or_more_when_fully_sharded(
    ranks: Ranks, fusion: Fusion
) -> None:
    layer_classes = ranks.run(
        layers.layer_class, Case(fusion, ((0,),), fully_sharded=True, plugin=False)
    )
    assert set(layer_classes) == {"MergedColumnParallelLinear"}


def test_stock_cuts_one_output_into_halves(ranks: Ranks) -> None:
    case = Case(ONE_OF_ONE, ((0,),), plugin=False)
    output = layers.assemble(ONE_OF_ONE, [r.output for r in ranks.run(layers.run, case)])
    error = (output - layers.dense(case)).abs().max().item()
    assert error == 0 if ranks.size == 1 else error > 1
