"""Model families on vLLM's GPU kernels, against the base layer with merged weights.

As ``tests/models/test_families.py``, which uses vLLM's CPU wrapper. The families that CI runs have
their own test; the others are in ``test_other_family`` (``-k other``).
"""

from __future__ import annotations

import pytest
from support import gpu_models
from support.families import FAMILIES
from support.families.family import EXACT, Family
from support.verdicts import is_in_installed_vllm, measure_outcomes

import vllm_nway_lora

AVAILABLE = [family for family in FAMILIES if is_in_installed_vllm(family)]
#: Unequal slices; interleaved rows; loaders that pad and replicate; five outputs; padding columns.
CHOSEN = ("Qwen3.5", "Qwen3-Next", "Granite 4 hybrid", "Falcon-H1", "Qwen4-Exp")
CI = [family for family in AVAILABLE if family.name.startswith(CHOSEN)]
OTHERS = [family for family in AVAILABLE if family not in CI]


def check(family: Family, size: int, fully_sharded: bool) -> None:
    vllm_nway_lora.register()
    with gpu_models.on_gpu_kernels() as calls:
        outcomes = measure_outcomes(family, size, fully_sharded)
    assert outcomes == [(fused.layer, fused.plugin) for fused in family.fused]
    if any(fused.plugin is EXACT and fused.called for fused in family.fused):
        assert calls.called


@pytest.mark.parametrize(
    ("family", "size", "fully_sharded"),
    [
        pytest.param(family, size, sharded, id=f"{family.name}-tp{size}{'-sharded' * sharded}")
        for family in CI
        for size, sharded in ((1, False), (2, False), (2, True), (4, False), (4, True))
        if size in family.sizes
    ],
)
def test_family(family: Family, size: int, fully_sharded: bool) -> None:
    check(family, size, fully_sharded)


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize(
    "family", [family for family in OTHERS if 2 in family.sizes], ids=lambda family: family.name
)
def test_other_family(family: Family, fully_sharded: bool) -> None:
    check(family, 2, fully_sharded)
