"""Tests of Qwen3.5-MoE in the other configurations: an engine for each.

Both model classes, one and two ranks, plain and fully sharded, and expert parallel. vLLM has no expert
parallelism with fully sharded adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.adapters import ServedModel
from support.moe_adapters import ROWS
from support.moe_checks import CLASSES, STOCK, EngineChecks, Run, run_engine
from support.moe_engine import Setup
from support.release import needs_qwen3_5_text

SETUPS = (
    Setup(1, False),
    Setup(1, True),
    Setup(2, False),
    Setup(2, True),
    Setup(2, False, expert_parallel=True),
)
#: ``test_engine.py`` has the configuration that is left out.
CONFIGURATIONS = [
    pytest.param(
        (name, setup),
        id=f"{name}-{setup}",
        marks=needs_qwen3_5_text if name == "text" else (),
    )
    for name in CLASSES
    for setup in SETUPS
    if (name, setup) != ("text", SETUPS[3])
]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def run(
    request: pytest.FixtureRequest,
    get_model: Callable[[str], ServedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    name, setup = request.param
    return run_engine(get_model(name), tmp_path_factory.mktemp("engine"), setup)


class TestConfiguration(EngineChecks):
    """See the base class."""

    def test_experts_are_on_one_rank_each(self, run: Run) -> None:
        is_split = "Local/global number of experts: 2/4" in run.log.read_text()
        assert is_split == run.setup.expert_parallel


@needs_qwen3_5_text
def test_stock_vllm_serves_some_adapters(
    get_model: Callable[[str], ServedModel], tmp_path: Path
) -> None:
    """Fails if a later release of vLLM fixes a defect."""
    stock = run_engine(get_model("text"), tmp_path, Setup(1, False), plugin=False)
    assert {name: stock.outcome(name) for name in ROWS} == STOCK
