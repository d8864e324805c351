"""The API server's record of adapters, and the same adapter on all engines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.executors import Request

from vllm_nway_lora.engine import server


class Serving:
    """Stands in for ``OpenAIServingModels`` with one loaded adapter, ``a1`` from ``/old``.

    Attributes:
        error: the error of the next load.
        sent: the calls to the engines.
    """

    def __init__(self, error: str = "", engines: int = 1, gone: bool = False) -> None:
        self.lora_requests = {"a1": Request("/old")}
        parallel_config = SimpleNamespace(data_parallel_size=engines)
        self.engine_client = self
        self.vllm_config = SimpleNamespace(parallel_config=parallel_config)
        self.error, self.gone = error, gone
        self.sent: list[tuple[str, Any]] = []

    async def add_lora(self, request: Request) -> None:
        self.sent.append((request.lora_path, request.load_inplace))
        if self.gone:
            raise FileNotFoundError(request.lora_path)

    async def remove_lora(self, number: int) -> None:
        self.sent.append(("remove", number))

    async def _load(self, request: Request) -> Any:
        if self.error:
            return SimpleNamespace(error=SimpleNamespace(message=self.error))
        self.lora_requests[request.lora_name] = request
        return "Success"

    def load(self, request: Request) -> Any:
        return asyncio.run(server.load_lora_adapter(self._load, self, (request,), {}))


@pytest.mark.parametrize("engines", [1, 2])
def test_load_clears_load_inplace(engines: int) -> None:
    serving = Serving(engines=engines)
    assert serving.load(Request("/new", inplace=True)) == "Success"
    assert not serving.lora_requests["a1"].load_inplace
    assert serving.sent == []


def test_refused_load_on_one_engine_is_left_to_it() -> None:
    serving = Serving("no z.")
    assert serving.load(Request("/new", inplace=True)).error.message == "no z."
    assert serving.sent == []
    assert serving.lora_requests["a1"].lora_path == "/old"


def test_refused_replacement_restores_the_old_adapter_on_all_engines() -> None:
    serving = Serving("no z.", engines=2)
    message = serving.load(Request("/new", inplace=True)).error.message
    assert message == "no z. All engines serve adapter 'a1' from /old, as before."
    assert serving.sent == [("/old", True)]
    assert not serving.lora_requests["a1"].load_inplace


@pytest.mark.parametrize(("path", "gone"), [("/old", False), ("/new", True)])
def test_refused_replacement_removes_an_adapter_whose_old_files_are_gone(
    path: str, gone: bool
) -> None:
    serving = Serving("no z.", engines=2, gone=gone)
    message = serving.load(Request(path, inplace=True)).error.message
    assert message.startswith("no z. Some engines had replaced adapter 'a1' already")
    assert serving.sent[-1] == ("remove", 1)
    assert serving.lora_requests == {}


def test_refused_new_adapter_is_left_to_the_engines() -> None:
    serving = Serving("no z.", engines=2)
    serving.load(Request("/b", number=2))
    assert serving.sent == []
