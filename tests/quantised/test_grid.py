"""Tests of quantised models in the other configurations: an engine for each."""

from __future__ import annotations

import pytest
from support.quantised_checkpoints import LAYOUTS
from support.quantised_checks import EngineChecks, Run, run_engine
from support.release import needs_qwen3_5_text

#: Model and number of ranks.
SERVED = (("Qwen3.5", 1), ("Qwen3.5", 2), ("Granite 4", 1), ("Falcon-H1", 2))
#: ``test_engine.py`` has the configuration that is left out.
CONFIGURATIONS = [
    pytest.param(
        (layout, name, size),
        id=f"{layout.name}-{name}-tp{size}",
        marks=needs_qwen3_5_text if name == "Qwen3.5" else (),
    )
    for layout in LAYOUTS
    for name, size in SERVED
    if (layout.name, name, size) != ("GPTQ", "Qwen3.5", 2)
]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    layout, name, size = request.param
    return run_engine(tmp_path_factory.mktemp("quantised"), name, layout, size)


class TestConfiguration(EngineChecks):
    """See the base class."""
