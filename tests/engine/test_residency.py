"""What the engine core knows of the adapters that its workers hold."""

from __future__ import annotations

import logging

import pytest
from support.executors import Engine, Request, Worker

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.engine import requests

pytest.importorskip("vllm")


@pytest.mark.parametrize("other", [{"name": "b"}, {"path": "/b"}])
def test_request_with_the_id_of_another_adapter_fails(other: dict[str, str]) -> None:
    engine = Engine(Worker())
    first = engine.add_request(Request("/a", name="a"))
    engine.step()
    engine.add_request(Request(**{"path": "/a", "name": "a", **other}))
    engine.step()
    assert engine.finished == [first]
    [answer] = engine.answers().values()
    assert "its id 1 belongs to the loaded adapter 'a' (/a)" in answer


def test_adapter_without_room_at_arrival_is_looked_at_before_its_step() -> None:
    worker = Worker(slots=2)
    engine = Engine(worker)
    good = [engine.add_request(Request(f"/{number}", number=number)) for number in (1, 2)]
    worker.fails["/3"] = "no z"
    bad = engine.add_request(Request("/3", number=3))
    assert engine.answers() == {}
    for _ in range(3):
        engine.step()
    assert engine.finished == good
    assert engine.answers() == {bad: f"{requests.REFUSED}no z"}


def test_running_adapter_needs_no_second_look_when_another_arrives() -> None:
    engine = Engine(Worker(capacity=2, slots=2))
    engine.add_request(Request("/1", number=1), steps=9)
    engine.add_request(Request("/2", number=2))
    engine.step()
    engine.add_request(Request("/3", number=3))  # takes the place of the second
    calls = engine.model_executor.calls
    engine.add_request(Request("/1", number=1))
    assert engine.model_executor.calls == calls


def test_adapter_that_a_failed_replacement_has_removed_is_looked_at_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Worker()
    engine = Engine(worker)
    engine.add_request(Request("/a"))
    engine.step()
    worker.breaks = "full"
    with caplog.at_level(logging.CRITICAL), pytest.raises(AdapterError, match="full"):
        engine.model_executor.add_lora(Request("/a", inplace=True))
    worker.fails["/a"] = "gone"
    lost = engine.add_request(Request("/a"))
    engine.step()
    assert engine.answers() == {lost: f"{requests.REFUSED}gone"}
