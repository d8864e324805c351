"""One server under bursts with bad, vanished, unloaded and replaced adapters: the part for CI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.adapters import prompts
from support.scale import SLOTS, ScaleServer, Served
from support.scale_load import Load


@pytest.fixture(scope="module")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScaleServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with ScaleServer(served.checkpoint, log, *SLOTS, plugin=True) as running:
        yield running


@pytest.fixture(scope="module")
def load(served: Served, server: ScaleServer) -> Load:
    return Load(served, server)


def test_answers_are_exact_while_adapters_come_and_go(load: Load) -> None:
    load.run(60, vanished=False)
    assert load.faults == []
    assert load.counts["exact"] >= 55
    assert load.calls == {"refusal": 8, "unload": 1, "load": 1, "replacement": 1}


def test_base_model_is_exact_after_a_burst(served: Served, server: ScaleServer) -> None:
    base = server.complete(server.models()[0], prompts(1)[0], score_prompt=False)
    assert served.judge.is_exact(None, base)


def test_adapter_that_vanishes_fails_alone(load: Load) -> None:
    """Its folder is deleted after it was loaded, and other adapters evict it."""
    load.run(30, vanished=True)
    assert load.faults == []
    assert load.counts["refused"] > 0
    assert load.counts["not found"] > 0
