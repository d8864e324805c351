"""A request whose adapter cannot be loaded fails alone, and costs nothing if its adapter is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.executors import Engine, Request, Worker

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import prepared
from vllm_nway_lora.engine import loading, requests

vllm = pytest.importorskip("vllm")


def test_request_with_resident_adapter_sends_no_rpc_and_reads_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(Worker())
    engine.add_request(None)
    assert engine.model_executor.calls == 0
    engine.add_request(Request("/a"))
    engine.step()
    calls = engine.model_executor.calls
    monkeypatch.setattr(os, "scandir", None)
    for _ in range(100):
        engine.add_request(Request("/a"))
        engine.step()
    assert engine.model_executor.calls == calls
    assert len(engine.finished) == 102


def test_arrival_takes_no_place_from_an_adapter_in_use() -> None:
    worker = Worker(capacity=2, slots=2)
    engine = Engine(worker)
    for number in (1, 2):
        engine.add_request(Request(f"/{number}", number=number), steps=5)
    engine.step()
    before = dict(worker.models)
    for number in (3, 4, 5):
        engine.add_request(Request(f"/{number}", number=number))
        assert worker.models == before
    for _ in range(20):
        engine.step()
    assert engine.finished == ["r1", "r2", "r3", "r4", "r5"]
    # Each adapter is read once, as in stock vLLM.
    assert sorted(worker.loads) == ["/1", "/2", "/3", "/4", "/5"]


def test_waiting_adapters_take_no_more_memory_than_the_slots() -> None:
    worker = Worker(slots=2)
    engine = Engine(worker)
    for number in range(1, 9):
        engine.add_request(Request(f"/{number}", number=number))
    assert len(prepared(worker)) == 2
    assert not worker.models


def test_prepared_adapters_of_requests_that_have_gone_are_dropped() -> None:
    worker = Worker(slots=2)
    engine = Engine(worker)
    gone = [engine.add_request(Request(f"/{number}", number=number)) for number in (1, 2)]
    engine.abort_requests(gone)
    engine.add_request(Request("/3", number=3))
    assert [source.path for source in prepared(worker)] == ["/3"]


def test_running_adapter_needs_no_file() -> None:
    """Its folder is deleted while it runs, and another adapter's request arrives."""
    worker = Worker(capacity=1, slots=1)
    engine = Engine(worker, max_loras=1)
    engine.model_executor.vllm_config.lora_config.max_cpu_loras = 1
    engine.add_request(Request("/a", number=1), steps=5)
    engine.step()
    worker.fails["/a"] = "gone"
    engine.add_request(Request("/b", number=2))
    for _ in range(8):
        engine.step()
    assert engine.finished == ["r1", "r2"]
    assert engine.answers() == {}


def test_adapter_pushed_to_the_workers_needs_one_look() -> None:
    worker = Worker()
    engine = Engine(worker)
    worker.add_lora(Request("/made-up"))
    worker.fails["*"] = "no such path"
    for _ in range(5):
        engine.add_request(Request("/made-up"))
        engine.step()
    assert len(engine.finished) == 5
    assert engine.model_executor.calls == 1


def test_refused_adapter_fails_only_its_request() -> None:
    worker = Worker()
    engine = Engine(worker)
    worker.fails["/bad"] = "no z"
    bad = engine.add_request(Request("/bad"))
    good = engine.add_request(Request("/good", number=2))
    engine.step()
    assert engine.finished == [good]
    assert engine.answers() == {bad: f"{requests.REFUSED}no z"}
    worker.fails.clear()
    again = engine.add_request(Request("/bad"))
    engine.step()
    assert engine.finished == [good, again]


@pytest.mark.parametrize("is_running", [False, True], ids=["waiting", "running"])
def test_unloaded_adapter_with_deleted_folder_fails_only_its_requests(is_running: bool) -> None:
    """Its requests wait or run. Stock vLLM's engine ends in the next step."""
    worker = Worker(capacity=2, slots=2)
    engine = Engine(worker, max_loras=2 if is_running else 1)
    first = engine.add_request(Request("/a", number=1), steps=4)
    lost = engine.add_request(Request("/b", number=2), steps=4)
    engine.step()
    engine.model_executor.remove_lora(2)
    for w in engine.model_executor.workers:
        prepared(w).clear()
    worker.fails["/b"] = "gone"
    for _ in range(8):
        engine.step()
    assert engine.finished == [first]
    assert engine.answers() == {lost: f"{requests.REFUSED}gone"}


def test_evicted_adapter_with_deleted_folder_fails_only_its_request() -> None:
    worker = Worker(capacity=2, slots=2)
    engine = Engine(worker)
    for number in (1, 2, 3):
        engine.add_request(Request(f"/{number}", number=number))
        engine.step()
    assert 1 not in worker.models
    worker.fails["/1"] = "gone"
    lost = engine.add_request(Request("/1", number=1))
    other = engine.add_request(Request("/2", number=2))
    engine.step()
    assert engine.answers() == {lost: f"{requests.REFUSED}gone"}
    assert engine.finished[-1] == other


def test_call_of_the_workers_is_followed_by_one_look() -> None:
    """Somebody may have removed an adapter."""
    worker = Worker()
    engine = Engine(worker)
    engine.add_request(Request("/a"))
    engine.step()

    def stock(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return engine.model_executor.collective_rpc(method, args)

    requests.collective_rpc(stock, engine, ("remove_lora", (1,)), {})
    worker.fails["/a"] = "gone"
    lost = engine.add_request(Request("/a"))
    engine.step()
    assert engine.answers() == {lost: f"{requests.REFUSED}gone"}


@pytest.mark.parametrize("path", ["/new", "/1"])
def test_load_inplace_replaces_once_and_evicts_nothing(path: str) -> None:
    worker = Worker(capacity=2)
    engine = Engine(worker)
    for number in (1, 2):
        engine.add_request(Request(f"/{number}", number=number), steps=4)
    engine.step()
    request = Request(path, number=1, name="a1", inplace=True)
    engine.add_request(request)
    assert not request.load_inplace
    for _ in range(4):
        engine.step()
    assert worker.loads == ["/1", "/2", path]
    assert {i: model.path for i, model in worker.models.items()} == {1: path, 2: "/2"}


def test_refused_load_inplace_keeps_the_old_adapter() -> None:
    worker = Worker()
    engine = Engine(worker)
    engine.add_request(Request("/old", name="a"))
    engine.step()
    worker.fails["/new"] = "no z"
    engine.add_request(Request("/new", name="a", inplace=True))
    assert worker.models[1].path == "/old"
    assert list(engine.answers().values()) == [f"{requests.REFUSED}no z"]


def test_foreign_workers_are_asked_once() -> None:
    worker = Worker()
    worker.model_runner.lora_manager = None
    engine = Engine(worker)
    for _ in range(5):
        engine.add_request(Request())
    assert engine.model_executor.calls == 1
    assert len(engine.scheduler.waiting) == 5


def test_engine_in_the_callers_process_raises() -> None:
    worker = Worker(fails="no z")
    engine = Engine(worker, in_process=True)
    with pytest.raises(AdapterError, match="^no z$") as error:
        engine.add_request(Request("/a"))
    assert error.value.request_ids == ("r1",)
    assert not engine.scheduler.waiting
    # A request that has been added before fails in the step, and leaves the scheduler.
    worker.fails.clear()
    engine.add_request(Request("/a"))
    engine.model_executor.remove_lora(1)
    loading._forget(worker, next(iter(prepared(worker))))
    worker.fails["*"] = "gone"
    engine.model_executor._nway_lora_residency.is_stale = True  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match="^gone$") as error:
        engine.step()
    assert error.value.request_ids == ("r2",)
    assert not engine.scheduler.waiting


def test_dead_workers_fail_the_request() -> None:
    engine = Engine(Worker())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TimeoutError("no reply")

    engine.model_executor.collective_rpc = fail  # type: ignore[method-assign,assignment]
    engine.add_request(Request())
    assert list(engine.answers().values()) == [f"{requests.REFUSED}TimeoutError: no reply"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_model.safetensors").write_text("one")
    return tmp_path


def test_files_are_listed(folder: Path) -> None:
    [(name, size, _)] = loading.list_files(str(folder)) or ()
    assert (name, size) == ("adapter_model.safetensors", 3)
    assert loading.list_files(str(folder / "nowhere")) is None


def test_listing_depends_on_names_sizes_and_times(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    seen = [loading.list_files(str(folder))]
    file.write_text("longer")
    os.utime(file, ns=(0, 0))
    seen.append(loading.list_files(str(folder)))
    os.utime(file, ns=(0, 1))
    seen.append(loading.list_files(str(folder)))
    (folder / "other").write_text("")
    assert loading.list_files(str(folder)) == seen[-1]
    (folder / "adapter_config.json").write_text("")
    seen.append(loading.list_files(str(folder)))
    assert len({repr(files) for files in seen}) == 4
