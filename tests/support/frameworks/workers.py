"""Workers of platforms with a LoRA manager of their own, in an engine of plain Python."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from support.executors import Engine, Executor, Request
from support.frameworks import packages


class PlatformWorker:
    """A platform's worker.

    Attributes:
        name: the platform.
        source: where its shape was read.
        steps: ids of the adapters with which it has run a step, the last one last.
        loads: ids of the adapters that it was told to add.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    def __init__(self) -> None:
        self.module: Any = packages.load(self.name)
        self.model_runner: Any = SimpleNamespace()
        self.steps: list[int] = []
        self.loads: list[int] = []

    def step(self, request: Request) -> None:
        """Run a step of a request with an adapter."""
        self.steps.append(request.lora_int_id)

    def add_lora(self, request: Request) -> bool:
        """Add an adapter, as a user asks for it."""
        raise NotImplementedError


class Rbln(PlatformWorker):
    """Adapters are compiled into the model; a step never loads one."""

    name = "rbln"
    source = "vllm-rbln 0.12.0, vllm_rbln/v1/worker/optimum_worker.py"

    def add_lora(self, request: Request) -> bool:
        self.loads.append(request.lora_int_id)
        if self.module is not None:
            return bool(self.module.RBLNOptimumWorker.add_lora(self, request))
        raise RuntimeError("It is not required in vLLM RBLN.")


class Metal(PlatformWorker):
    """It has a manager under another name; a step of an adapter that was not added fails."""

    name = "metal"
    source = "vllm-metal 4fc6bb0, vllm_metal/v1/lora/worker_manager.py; model_runner._lora"

    def __init__(self) -> None:
        super().__init__()
        self.model_runner = SimpleNamespace(_lora=SimpleNamespace(ids=set()))

    def step(self, request: Request) -> None:
        if request.lora_int_id not in self.model_runner._lora.ids:
            raise RuntimeError(f"LoRA {request.lora_int_id} requested but not loaded")
        super().step(request)

    def add_lora(self, request: Request) -> bool:
        self.loads.append(request.lora_int_id)
        is_new = request.lora_int_id not in self.model_runner._lora.ids
        self.model_runner._lora.ids.add(request.lora_int_id)
        return is_new


class OtherManager(PlatformWorker):
    """Its manager has vLLM's attribute, and neither ``_load_adapter`` nor ``list_adapters``."""

    name = "other manager"
    source = "no project: a `lora_manager` with its own methods only"

    def __init__(self) -> None:
        super().__init__()
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace())

    def add_lora(self, request: Request) -> bool:
        self.loads.append(request.lora_int_id)
        return True


WORKERS: dict[str, type[PlatformWorker]] = {
    worker.name: worker for worker in (Rbln, Metal, OtherManager)
}


class PlatformEngine(Engine):
    """An engine core with the plugin, and a step in which the workers load nothing."""

    def __init__(self, *workers: Any) -> None:
        super().__init__(*workers)
        self.model_executor: Executor

    def _stock_step(self) -> None:
        waiting = self.scheduler.waiting
        while waiting:
            request = waiting.popleft()
            for worker in self.model_executor.workers:
                worker.step(request.lora_request)
            self.finished.append(request.request_id)
