"""An adapter is loaded by all ranks or by none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.executors import Executor, Request, Worker

from vllm_nway_lora.adapters.errors import AdapterError


def test_adapter_is_loaded_once_on_each_rank() -> None:
    executor = Executor(Worker(), Worker())
    assert executor.add_lora(Request("/a"))
    assert executor.adapters() == [{1: "/a"}] * 2
    assert executor.add_lora(Request("/b"))  # loaded already
    assert executor.adapters() == [{1: "/a"}] * 2
    assert executor.add_lora(Request("/b", inplace=True))
    assert executor.adapters() == [{1: "/b"}] * 2
    assert [worker.loads for worker in executor.workers] == [2, 2]


def test_error_of_all_ranks_is_reported_once() -> None:
    executor = Executor(Worker(fails="no z"), Worker(fails="no z"))
    with pytest.raises(AdapterError, match="^no z$"):
        executor.add_lora(Request())
    assert executor.adapters() == [{}, {}]


def test_refusal_of_one_rank_leaves_old_adapter_on_all_ranks() -> None:
    executor = Executor(Worker(), Worker(), Worker())
    executor.add_lora(Request("/old"))
    executor.workers[1].fails = "no z."
    words = "On rank 0, 2 of 3: no error. On rank 1 of 3: no z."
    with pytest.raises(AdapterError) as error:
        executor.add_lora(Request("/new", inplace=True))
    assert str(error.value) == words
    assert executor.adapters() == [{1: "/old"}] * 3


def test_failed_write_on_one_rank_removes_adapter_from_all_ranks() -> None:
    executor = Executor(Worker(), Worker(breaks="full"))
    with pytest.raises(
        AdapterError,
        match="On rank 1 of 2: MemoryError: full. Adapter 'a1' has been removed from every rank",
    ):
        executor.add_lora(Request())
    assert executor.adapters() == [{}, {}]


def test_workers_without_a_lora_manager_behave_as_in_stock_vllm() -> None:
    worker = SimpleNamespace(add_lora=lambda request: True)
    assert Executor(worker).add_lora(Request())  # type: ignore[arg-type]
