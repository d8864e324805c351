"""LoRA on the layers to which a state-space mixer passes a part of a batch: exact, or refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from support import mixers
from support.mixers import Case
from support.ranks import Ranks

CASES = {
    "mixed": Case((1, -1, 0), (2, 2, 0, 0, -1, 1)),
    "mixed, padded": Case((1, -1, 0), (2, 2, 0), padding=3),
    "as many of both": Case((1, 0), (0, 2)),
    "decodes": Case((2, 1, -1, 0)),
    "decodes, padded": Case((2, 1), padding=2),
    "prefills": Case((), (1, 1, -1, 0, 0)),
    "prefills, padded": Case((), (1, 1), padding=1),
}


MODELS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon-mamba": {"is_normed": True},
    "plamo2": {"model": "plamo2"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batch_equals_merged_weights(
    ranks: Ranks, case: Case, fully_sharded: bool, model: str
) -> None:
    if importlib.util.find_spec(mixers.MODULES[MODELS[model].get("model", "mamba")]) is None:
        pytest.skip(f"this release of vLLM has no {model}")
    case = dataclasses.replace(case, fully_sharded=fully_sharded, **MODELS[model])
    for output, expected, base in ranks.run(mixers.run, case):
        effect = (expected - base).abs().max()
        assert effect > 1
        assert (output - expected).abs().max() < 1e-5 * effect


def test_without_correction_the_batch_fails(ranks: Ranks) -> None:
    """On CPU vLLM compares the numbers of tokens; on a GPU LoRA takes the tokens of other requests."""
    with pytest.raises(RuntimeError, match="subscript|size"):
        ranks.run(mixers.run, dataclasses.replace(CASES["mixed"], corrected=False))


def test_unknown_part_of_a_batch_raises_if_an_adapter_is_there(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="its batch is not known here"):
        ranks.run(mixers.run, dataclasses.replace(CASES["decodes"], is_known=False))


def test_unknown_part_of_a_batch_without_adapters_is_left_to_vllm(ranks: Ranks) -> None:
    case = Case((-1,), (-1, -1), has_lora=False, is_known=False)
    for output, expected, _ in ranks.run(mixers.run, case):
        assert torch.equal(output, expected)
