"""A request whose adapter cannot be loaded fails alone."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.executors import Executor, Request, Worker

from vllm_nway_lora.engine import requests


class Engine:
    def __init__(self, *workers: Worker) -> None:
        self.model_executor = Executor(*workers)
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.scheduled: list[Any] = []

    def add_request(self, lora_request: Request | None) -> None:
        request = SimpleNamespace(request_id="r", client_index=3, lora_request=lora_request)
        requests.add_request(self.scheduled.append, self, (request,), {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_model.safetensors").write_text("one")
    return tmp_path


def test_request_without_lora_or_with_loaded_adapter_sends_no_rpc(folder: Path) -> None:
    engine = Engine(Worker())
    engine.add_request(None)
    assert engine.model_executor.calls == 0
    engine.add_request(Request(folder))
    calls = engine.model_executor.calls
    engine.add_request(Request(folder))
    assert engine.model_executor.calls == calls > 0
    assert len(engine.scheduled) == 3


def test_refused_adapter_fails_only_its_request(folder: Path) -> None:
    pytest.importorskip("vllm")
    engine = Engine(Worker(fails="no z"))
    engine.add_request(Request(folder))
    assert not engine.scheduled
    client, outputs = engine.output_queue.get_nowait()
    assert client == 3
    assert [str(output.finish_reason) for output in outputs.outputs] == ["error"]
    engine.model_executor.workers[0].fails = ""
    engine.add_request(Request(folder))
    assert len(engine.scheduled) == 1


@pytest.mark.parametrize("change", ["write", "unlink"])
def test_adapter_with_changed_files_is_loaded_before_its_step(folder: Path, change: str) -> None:
    engine = Engine(Worker())
    engine.add_request(Request(folder))
    [worker] = engine.model_executor.workers
    file = folder / "adapter_model.safetensors"
    file.write_text("other") if change == "write" else file.unlink()
    worker.fails = "gone"
    engine.add_request(Request(folder))  # still loaded: served
    worker.adapters.clear()  # evicted
    engine.add_request(Request(folder))
    assert len(engine.scheduled) == 2
    assert engine.output_queue.qsize() == 1


def test_load_inplace_is_done_once_per_request(folder: Path) -> None:
    engine = Engine(Worker())
    for _ in range(2):
        engine.add_request(Request(folder, inplace=True))
    assert engine.model_executor.workers[0].loads == 2
    assert not any(request.lora_request.load_inplace for request in engine.scheduled)


def test_engine_that_cannot_answer_is_unchanged() -> None:
    engine = Engine(Worker(fails="no z"))
    del engine.output_queue
    engine.add_request(Request())
    assert len(engine.scheduled) == 1
