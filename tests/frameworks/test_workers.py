"""Platforms with a LoRA manager of their own are left as they are, and their requests reach them."""

from __future__ import annotations

import pytest
from support.executors import Request
from support.frameworks import packages
from support.frameworks.workers import WORKERS, Metal, PlatformEngine

pytestmark = pytest.mark.parametrize("name", packages.chosen(WORKERS))


def test_requests_reach_the_worker_after_one_question(name: str) -> None:
    worker = WORKERS[name]()
    before = dict(vars(worker.model_runner))
    if isinstance(worker, Metal):
        for number in (1, 2):
            worker.add_lora(Request("/nowhere", number=number))
        worker.loads.clear()
    engine = PlatformEngine(worker)
    for _ in range(3):
        for number in (1, 2):
            engine.add_request(Request("/nowhere", number=number))
        engine.step()
    assert engine.answers() == {}
    assert len(engine.finished) == 6
    assert worker.steps == [1, 2] * 3
    assert worker.loads == []
    assert engine.model_executor.calls == 1
    assert vars(worker.model_runner) == before


def test_add_lora_answers_as_the_worker_does(name: str) -> None:
    worker = WORKERS[name]()
    executor = PlatformEngine(worker).model_executor
    request = Request("/nowhere")
    if name == "rbln":
        with pytest.raises(RuntimeError, match=r"^It is not required in vLLM RBLN\.$"):
            executor.add_lora(request)
    else:
        assert executor.add_lora(request)
        assert executor.add_lora(request) == (name != "metal")
    assert set(worker.loads) == {1}


def test_own_worker_is_run_where_it_is_given(name: str) -> None:
    """``ci/frameworks.py`` gives it."""
    assert (WORKERS[name]().module is not None) == packages.is_given(name)
