"""Tests of Qwen3.5-MoE in one engine: the text class on two ranks, fully sharded.

``test_grid.py`` has the other configurations.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.adapters import ServedModel
from support.moe_checks import EngineChecks, Run, run_engine
from support.moe_engine import Setup
from support.release import needs_qwen3_5_text

pytestmark = needs_qwen3_5_text


@pytest.fixture(scope="module")
def run(get_model: Callable[[str], ServedModel], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_engine(get_model("text"), tmp_path_factory.mktemp("engine"), Setup(2, True))


class TestTextOnTwoRanks(EngineChecks):
    """See the base class."""
