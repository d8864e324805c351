"""Workers, an executor and requests of plain Python, for the tests of the engine room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_nway_lora.adapters import prepared
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import get_prepared
from vllm_nway_lora.engine import loading


class Request(SimpleNamespace):
    """Stands in for a ``LoRARequest``."""

    def __init__(self, path: Path | str = "/nowhere", *, number: int = 1, inplace: bool = False):
        super().__init__(
            lora_name=f"a{number}", lora_int_id=number, lora_path=str(path), load_inplace=inplace
        )


class Worker:
    """A worker and its LoRA manager in one.

    ``fails`` is the error of its loads, ``breaks`` the error of its writes, ``adapters`` its content.
    """

    def __init__(self, fails: str = "", breaks: str = "") -> None:
        self.fails, self.breaks = fails, breaks
        self.adapters: dict[int, str] = {}
        self.loads = 0
        self.model_runner = SimpleNamespace(lora_manager=self)

    def list_adapters(self) -> set[int]:
        return set(self.adapters)

    def _load_adapter(self, request: Request) -> str:
        if self.fails:
            raise AdapterError(self.fails)
        self.loads += 1
        return request.lora_path

    def add_lora(self, request: Request) -> bool:
        if request.lora_int_id not in self.adapters or request.load_inplace:
            adapter = get_prepared(self, request)
            assert adapter is not None
            self.adapters.pop(request.lora_int_id, None)
            # As vLLM until 0.32.0: it assigns the slot before it writes it.
            self.adapters[request.lora_int_id] = adapter
            if self.breaks:
                raise MemoryError(self.breaks)
        return True

    def remove_adapter(self, number: int) -> bool:
        return self.adapters.pop(number, None) is not None


class Executor:
    def __init__(self, *workers: Worker) -> None:
        self.workers = workers
        self.calls = 0

    def collective_rpc(self, method: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls += 1
        return [method(worker, *args) for worker in self.workers]

    def add_lora(self, request: Request) -> bool:
        return loading.add_lora(None, self, (request,), {})

    def adapters(self) -> list[dict[int, str]]:
        assert not any(hasattr(worker, prepared._ATTRIBUTE) for worker in self.workers)
        return [worker.adapters for worker in self.workers]
