"""A step runs only requests whose adapter is there, whatever order the scheduler takes them in."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("vllm")

from support.executors import Engine, Request, Worker

from vllm_nway_lora.adapters.prepared import prepared
from vllm_nway_lora.engine import requests

SLOTS, ADAPTERS = 4, 10


@pytest.mark.parametrize("has_skipped_queue", [False, True], ids=["one-queue", "skipped-queue"])
@pytest.mark.parametrize("places", [4, 6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_vanished_adapters_fail_only_their_requests(
    ranks: int, places: int, has_skipped_queue: bool
) -> None:
    """More adapters are in use than there are places, and folders are deleted meanwhile."""
    refused = 0
    for seed in range(100):
        random = Random(seed)
        workers = [Worker(capacity=places, slots=SLOTS) for _ in range(ranks)]
        engine = Engine(
            *workers, max_loras=SLOTS, max_cpu_loras=places, has_skipped_queue=has_skipped_queue
        )
        for number in range(1, ADAPTERS + 1):
            engine.model_executor.add_lora(Request(f"/{number}", number=number))
        sent: dict[str, int] = {}
        gone: set[int] = set()
        for _ in range(60):
            engine.blocked = {r for r in engine.blocked if random.random() < 0.7}
            for _ in range(random.randint(0, 3)):
                number = random.randint(1, ADAPTERS)
                request = engine.add_request(
                    Request(f"/{number}", number=number),
                    steps=random.randint(1, 4),
                    is_blocked=random.random() < 0.2,
                )
                sent[request] = number
            if random.random() < 0.1 and len(gone) < 3:
                gone.add(random.randint(1, ADAPTERS))
                for worker in workers:
                    worker.fails |= {f"/{number}": "gone" for number in gone}
            engine.step()  # raises if a worker has to read a folder that is gone
            assert all(len(prepared(worker)) <= SLOTS for worker in workers)
        engine.blocked.clear()
        while engine.scheduler.requests:
            engine.step()
        answers = engine.answers()
        refused += len(answers)
        assert {sent[request] for request in answers} <= gone
        assert sorted([*answers, *engine.finished]) == sorted(sent)
    assert refused > 20


def test_request_that_waits_for_something_else_takes_no_place() -> None:
    worker = Worker(capacity=1, slots=1)
    engine = Engine(worker, max_loras=1, max_cpu_loras=1)
    first = engine.add_request(Request("/1", number=1), steps=2)
    engine.step()
    blocked = engine.add_request(Request("/2", number=2), is_blocked=True)
    other = engine.add_request(Request("/3", number=3))
    for _ in range(4):
        engine.step()
    assert engine.finished == [first, other]
    engine.blocked.clear()
    engine.step()
    assert engine.finished == [first, other, blocked]


def test_requests_keep_their_order_while_their_adapters_are_not_there() -> None:
    worker = Worker(capacity=1, slots=1)
    engine = Engine(worker, max_loras=1, max_cpu_loras=1)
    sent = [
        engine.add_request(Request(f"/{number % 3}", number=number % 3 + 1)) for number in range(9)
    ]
    while engine.scheduler.requests:
        before = [request.request_id for request in engine.scheduler.waiting]
        engine.step()
        after = [request.request_id for request in engine.scheduler.waiting]
        assert after == [request for request in before if request in after]
    assert sorted(engine.finished) == sorted(sent)


def test_only_the_choice_of_requests_does_not_see_those_that_are_not_ready() -> None:
    """The rest of a step counts, aborts and fails them."""
    worker = Worker(capacity=1, slots=1)
    engine = Engine(worker, max_loras=1, max_cpu_loras=1)
    engine.add_request(Request("/1", number=1), steps=3)
    engine.step()
    engine.add_request(Request("/2", number=2))
    lost = engine.add_request(Request("/3", number=3))
    seen = []

    def schedule() -> None:
        seen.append([request.request_id for request in engine.scheduler.waiting])
        engine._schedule()

    def step_and_abort() -> None:
        engine._stock_step()
        assert lost in [request.request_id for request in engine.scheduler.waiting]
        engine.abort_requests([lost])

    engine.scheduler.schedule = schedule
    requests.step(step_and_abort, engine, (), {})
    assert seen == [["r2"]]
    assert engine.scheduler.schedule is schedule
    while engine.scheduler.requests:
        engine.step()
    assert engine.finished == ["r1", "r2"]


@pytest.mark.parametrize("kind", ["of KV blocks", "of something else"])
def test_requests_that_cannot_run_yet_cost_no_call_of_the_workers(kind: str) -> None:
    """They wait for KV blocks, or for a grammar, a KV transfer or the next input of a session."""
    worker = Worker(capacity=2, slots=2)
    engine = Engine(worker)
    engine.add_request(Request("/1", number=1), steps=200)
    engine.step()
    for number in (2, 3, 4):
        request = engine.add_request(
            Request(f"/{number}", number=number), is_blocked=kind == "of something else"
        )
        engine.blocked.add(request)
    for _ in range(5):
        engine.step()
    calls = engine.model_executor.calls
    for _ in range(100):
        engine.step()
    assert engine.model_executor.calls == calls
    engine.blocked.clear()
    while engine.scheduler.requests:
        engine.step()
    assert sorted(engine.finished) == ["r1", "r2", "r3", "r4"]
