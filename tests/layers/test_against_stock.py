"""The same layers on vLLM's own classes: where these are exact, and each of their defects.

``vllm_nway_lora.compat.defects`` lists the expected defects of a release. A test of a defect fails
when upstream has fixed it; then this package's fix can be removed.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import vllm
from support import layers
from support.layers import Case, Fusion, Result
from support.ranks import Ranks

from vllm_nway_lora.compat import defects as table

QKVZ = Fusion("in_proj_qkvz", (32, 32, 64, 64), ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,)))
ONE_OF_ONE = Fusion("in_proj_qkvz", (48,), ("in_proj_qkvz",), ((0,),))
ONE_OF_FIVE = Fusion("in_proj", (16, 16, 8, 8, 4), ("in_proj",), ((0, 1, 2, 3, 4),))
FOUR_OF_FOUR = Fusion("in_proj_qkvg", (8, 8, 8, 8), tuple("qkvg"), ((0,), (1,), (2,), (3,)))
QKV, Z = (0,), (1,)


def messages(defect: str) -> tuple[str, ...] | None:
    return table.find(defect).messages(vllm.__version__)


def run_stock(ranks: Ranks, case: Case, *defects: str) -> list[Result]:
    """Run a case on vLLM's own classes.

    If the installed release has one of ``defects``, check that it fails as the table says, and
    return nothing.
    """
    if not case.fully_sharded and ranks.size > 1:
        defects = (*defects, "gathered-when-whole")
    words = [re.escape(message) for defect in defects for message in messages(defect) or ()]
    if not words:
        return ranks.run(layers.run, case.stock())
    with pytest.raises(RuntimeError, match="|".join(words)):
        ranks.run(layers.run, case.stock())
    return []


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_half_of_the_slices_give_the_same_bits(
    ranks: Ranks, fully_sharded: bool, prefill: bool
) -> None:
    case = Case(QKVZ, ((*QKV, *Z),) * 3, fully_sharded=fully_sharded, prefill=prefill)
    ours, theirs = ranks.run(layers.run, case), run_stock(ranks, case, "fewer-modules-than-outputs")
    assert {(mine.layer_class, mine.n_slices) for mine in ours} == {("NWayLinearWithLoRA", 2)}
    for mine, stock in zip(ours, theirs):
        assert messages("copied-lora-a") is not None
        assert stock.layer_class.startswith("MergedColumnParallelLinearWith")
        assert torch.equal(mine.output, stock.output)
        assert stock.n_slices == 4
        assert mine.lora_a_bytes * 2 == stock.lora_a_bytes
        assert mine.gathered_columns * 2 == stock.gathered_columns


@pytest.mark.parametrize("modules", [2, 1])
def test_two_equal_outputs_stay_on_vllms_class(ranks: Ranks, modules: int) -> None:
    groups = ((0,), (1,)) if modules == 2 else ((0, 1),)
    fusion = Fusion("gate_up_proj", (16, 16), ("gate_proj", "up_proj")[:modules], groups)
    case = Case(fusion, ((0,),))
    [ours], [theirs] = (set(ranks.run(layers.layer_class, c)) for c in (case, case.stock()))
    # Unless vLLM's class for pairs gathers over all ranks what every rank has.
    gathers = modules == 2 and ranks.size > 1 and messages("gathered-when-whole") is not None
    assert theirs != "NWayLinearWithLoRA"
    assert (ours == theirs) != gathers


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    ("adapted", "defect"),
    [(Z, "first-module-left-out"), (QKV, "last-module-left-out")],
    ids=["z", "qkv"],
)
def test_stock_with_one_module_of_two(
    ranks: Ranks, adapted: tuple[int, ...], defect: str, fully_sharded: bool
) -> None:
    case = Case(QKVZ, (adapted,), fully_sharded=fully_sharded)
    theirs = run_stock(ranks, case, defect)
    if theirs:
        output = layers.assemble(QKVZ, [stock.output for stock in theirs])
        assert torch.equal(output, layers.dense(case))


@pytest.mark.parametrize("fusion", [ONE_OF_FIVE, FOUR_OF_FOUR], ids=["1of5", "4of4"])
def test_stock_ignores_three_outputs_or_more_when_fully_sharded(
    ranks: Ranks, fusion: Fusion
) -> None:
    layer_classes = ranks.run(
        layers.layer_class, Case(fusion, ((0,),), fully_sharded=True, plugin=False)
    )
    assert set(layer_classes) == {"MergedColumnParallelLinear"}
    # The LoRA manager logs the message. In its source, the text is split over several lines.
    from vllm.lora import model_manager

    source = re.sub(r'"\s+f?"', "", inspect.getsource(model_manager))
    [words] = messages("unwrapped-when-fully-sharded") or ()
    assert words in source


def test_stock_cuts_one_output_into_halves(ranks: Ranks) -> None:
    assert messages("one-module-cut-in-halves") == ()
    case = Case(ONE_OF_ONE, ((0,),), plugin=False)
    output = layers.assemble(ONE_OF_ONE, [r.output for r in ranks.run(layers.run, case)])
    error = (output - layers.dense(case)).abs().max().item()
    assert error == 0 if ranks.size == 1 else error > 1
