"""An adapter is loaded by all ranks or by none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from support.executors import Executor, Request, Worker

from vllm_nway_lora.adapters.errors import AdapterError


def test_adapter_is_loaded_once_on_each_rank() -> None:
    executor = Executor(Worker(), Worker())
    assert executor.add_lora(Request("/a"))
    assert executor.adapters() == [{1: "/a"}] * 2
    assert executor.add_lora(Request("/a"))  # loaded already
    assert executor.adapters() == [{1: "/a"}] * 2
    assert executor.add_lora(Request("/b", inplace=True))
    assert executor.adapters() == [{1: "/b"}] * 2
    assert [worker.loads for worker in executor.workers] == [["/a", "/b"]] * 2


def test_error_of_all_ranks_is_reported_once() -> None:
    executor = Executor(Worker(fails="no z"), Worker(fails="no z"))
    with pytest.raises(AdapterError, match="^no z$"):
        executor.add_lora(Request())
    assert executor.adapters() == [{}, {}]


def test_refusal_of_one_rank_leaves_old_adapter_on_all_ranks() -> None:
    executor = Executor(Worker(), Worker(), Worker())
    executor.add_lora(Request("/old"))
    executor.workers[1].fails["*"] = "no z."
    words = "On rank 0, 2 of 3: no error. On rank 1 of 3: no z."
    with pytest.raises(AdapterError) as error:
        executor.add_lora(Request("/new", inplace=True))
    assert str(error.value) == words
    assert executor.adapters() == [{1: "/old"}] * 3


def test_failed_write_on_one_rank_removes_adapter_from_all_ranks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = Executor(Worker(), Worker(breaks="full"))
    words = "On rank 1 of 2: MemoryError: full. Adapter 'a1' has been removed from every rank"
    with caplog.at_level(logging.CRITICAL), pytest.raises(AdapterError, match=words):
        executor.add_lora(Request())
    assert executor.adapters() == [{}, {}]


def test_added_adapter_makes_vllm_compute_the_token_mapping_again() -> None:
    """Until 0.25.1 vLLM keeps it although the slots have changed (vllm-project/vllm#47724)."""
    worker = Worker()
    worker._last_mapping = "of the last batch"  # type: ignore[attr-defined]
    Executor(worker).add_lora(Request("/a"))
    assert worker._last_mapping is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", [{"name": "b"}, {"path": "/b"}])
def test_id_of_another_adapter_is_refused(other: dict[str, str]) -> None:
    executor = Executor(Worker(), Worker())
    executor.add_lora(Request("/a", name="a"))
    request = Request(**{"path": "/a", "name": "a", **other})
    words = r"its id 1 belongs to the loaded adapter 'a' \(/a\)"
    with pytest.raises(AdapterError, match=words):
        executor.add_lora(request)
    assert executor.adapters() == [{1: "/a"}] * 2
    executor.remove_lora(1)
    assert executor.add_lora(request)


class ForeignWorker:
    """A worker whose LoRA manager, if any, is not vLLM's; its ``add_lora`` answers."""

    def __init__(self, manager: object = None) -> None:
        self.model_runner = SimpleNamespace(lora_manager=manager)
        self.asked: list[Request] = []

    def add_lora(self, request: Request) -> bool:
        self.asked.append(request)
        return True


@pytest.mark.parametrize("manager", [None, SimpleNamespace(list_adapters=set)])
def test_workers_of_another_kind_behave_as_in_stock_vllm(manager: object) -> None:
    worker = ForeignWorker(manager)
    request = Request()
    assert Executor(worker).add_lora(request)  # type: ignore[arg-type]
    assert worker.asked == [request]


def test_request_without_load_inplace_is_accepted() -> None:
    """Other packages have request classes of their own."""
    executor = Executor(Worker())
    executor.add_lora(Request("/a"))
    request = Request("/a")
    del request.load_inplace
    executor.workers[0].add_lora = lambda request: True  # type: ignore[method-assign]
    assert executor.add_lora(request)
