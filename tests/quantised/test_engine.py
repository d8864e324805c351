"""Tests of a quantised Qwen3.5 in one engine: GPTQ on two ranks, fully sharded.

``test_grid.py`` has the other configurations.
"""

from __future__ import annotations

import pytest
from support.quantised_checkpoints import LAYOUTS
from support.quantised_checks import EngineChecks, Run, run_engine
from support.release import needs_qwen3_5_text

pytestmark = needs_qwen3_5_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    gptq = next(layout for layout in LAYOUTS if layout.name == "GPTQ")
    return run_engine(tmp_path_factory.mktemp("quantised"), "Qwen3.5", gptq, 2)


class TestGptqOnTwoRanks(EngineChecks):
    """See the base class."""
