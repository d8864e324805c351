"""Tests of every family's fused projections in vLLM's own model classes, with the plugin and without.

The reference does not use the plan: it is the base layer's output after the model's own code has
loaded a checkpoint with ``W + B A`` instead of ``W``. vLLM loads the adapters from files, under the
names of the checkpoint. So the tests cover names, mappings, shards and rows.
"""

from __future__ import annotations

import pytest
import vllm
from packaging.version import Version
from support.families import FAMILIES
from support.families.family import Family
from support.verdicts import is_in_installed_vllm, measure_outcomes

import vllm_nway_lora

AVAILABLE = [family for family in FAMILIES if is_in_installed_vllm(family)]
#: The table has the outcomes on stock vLLM from this release on; earlier releases have more defects.
TABLE_SINCE = Version("0.29.0")


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(family, size, id=f"{family.name}-tp{size}")
        for family in AVAILABLE
        for size in family.sizes
    ],
)
def test_plugin_outcomes_match_table(family: Family, size: int, fully_sharded: bool) -> None:
    vllm_nway_lora.register()
    outcomes = measure_outcomes(family, size, fully_sharded)
    assert outcomes == [(fused.layer, fused.plugin) for fused in family.fused]


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize(
    "family",
    AVAILABLE if Version(vllm.__version__) >= TABLE_SINCE else [],
    ids=lambda family: family.name,
)
def test_stock_outcomes_match_table(family: Family, size: int, fully_sharded: bool) -> None:
    vllm_nway_lora.unregister()
    outcomes = measure_outcomes(family, size, fully_sharded)
    mode = (size > 1) + 2 * fully_sharded
    assert outcomes == [(fused.layer, fused.stock[mode]) for fused in family.fused]
