"""Every family's fused projections, in vLLM's own model classes: exact, and what stock makes of them.

The reference is independent of the plan: what the base layer computes after the model's own code
has loaded a checkpoint with ``W + B A`` in place of ``W``. Adapters come from files, by the names of
the checkpoint, through vLLM's own loading; so names, mappings, shards and rows are all held.
"""

from __future__ import annotations

import pytest
import vllm
from packaging.version import Version
from support.families import FAMILIES
from support.family import Family
from support.verdicts import family_verdicts, runs_here

import vllm_nway_lora

HERE = [family for family in FAMILIES if runs_here(family)]
#: The table tells what stock vLLM does from this release on; before, more of it was wrong.
TABLE_SINCE = Version("0.29.0")


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(family, size, id=f"{family.name}-tp{size}")
        for family in HERE
        for size in family.sizes
    ],
)
def test_family(family: Family, size: int, fully_sharded: bool) -> None:
    vllm_nway_lora.register()
    verdicts = family_verdicts(family, size, fully_sharded)
    assert verdicts == [(fused.layer, fused.plugin) for fused in family.fused]


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize(
    "family",
    HERE if Version(vllm.__version__) >= TABLE_SINCE else [],
    ids=lambda family: family.name,
)
def test_stock(family: Family, size: int, fully_sharded: bool) -> None:
    vllm_nway_lora.unregister()
    verdicts = family_verdicts(family, size, fully_sharded)
    mode = (size > 1) + 2 * fully_sharded
    assert verdicts == [(fused.layer, fused.stock[mode]) for fused in family.fused]
