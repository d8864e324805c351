"""Workers, an executor and an engine of plain Python, for the tests of the engine subpackage."""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import RequestStatus

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.hooks import apply_adapters
from vllm_nway_lora.adapters.prepared import prepared, take_prepared
from vllm_nway_lora.engine import loading, requests


class Request(SimpleNamespace):
    """Stands in for a ``LoRARequest``."""

    def __init__(
        self,
        path: Path | str = "/nowhere",
        *,
        number: int = 1,
        name: str = "",
        inplace: bool = False,
    ) -> None:
        super().__init__(
            lora_name=name or f"a{number}",
            lora_int_id=number,
            lora_path=str(path),
            load_inplace=inplace,
        )


class Adapter:
    """Stands in for a ``LoRAModel``."""

    def __init__(self, path: str) -> None:
        self.path = path


class Worker:
    """A worker, its LoRA manager of the worker and that of the model, in one.

    Attributes:
        fails: adapter's path (or ``"*"`` for all) -> the error of its loads.
        breaks: the error of its writes.
        models: id -> adapter, the least recently used first.
        loads: the paths that it has read.
    """

    def __init__(
        self, fails: str = "", breaks: str = "", capacity: int = 2, slots: int = 2
    ) -> None:
        self.fails = {"*": fails} if fails else {}
        self.breaks, self.capacity, self.lora_slots = breaks, capacity, slots
        self.models: OrderedDict[int, Adapter] = OrderedDict()
        self.loads: list[str] = []
        self._adapter_manager = self
        self.model_runner = SimpleNamespace(lora_manager=self)

    def list_adapters(self) -> dict[int, Adapter]:
        return dict(self.models)

    def _load_adapter(self, request: Request) -> Adapter:
        taken: Adapter | None = take_prepared(self, request)
        if taken is not None:
            return taken
        error = self.fails.get("*") or self.fails.get(request.lora_path)
        if error:
            raise AdapterError(error)
        self.loads.append(request.lora_path)
        return Adapter(request.lora_path)

    def add_lora(self, request: Request) -> bool:
        """Add an adapter as ``LRUCacheWorkerLoRAManager.add_adapter`` does."""
        number = request.lora_int_id
        if number not in self.models or request.load_inplace:
            adapter = self._load_adapter(request)
            self.models.pop(number, None)
            if len(self.models) + 1 > self.capacity:
                self.models.popitem(last=False)
            # As vLLM until 0.32.0: it assigns the slot before it writes it.
            self.models[number] = adapter
            if self.breaks:
                raise MemoryError(self.breaks)
        self.models.move_to_end(number)
        return True

    def run(self, requests: list[Request]) -> None:
        """Use the adapters of a step as ``LRUCacheWorkerLoRAManager._apply_adapters`` does."""
        apply_adapters(self._stock_run, self, (requests,), {})

    def _stock_run(self, requests: list[Request]) -> None:
        for request in requests:
            self.add_lora(request)

    def remove_adapter(self, number: int) -> bool:
        return self.models.pop(number, None) is not None

    remove_lora = remove_adapter


class Executor:
    """Calls its workers in turn and counts the calls."""

    def __init__(self, *workers: Worker, max_cpu_loras: int = 2, max_loras: int = 2) -> None:
        self.workers = workers
        self.calls = 0
        lora_config = SimpleNamespace(max_cpu_loras=max_cpu_loras, max_loras=max_loras)
        self.vllm_config = SimpleNamespace(lora_config=lora_config)

    def collective_rpc(
        self, method: Callable[..., Any] | str, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        self.calls += 1
        if isinstance(method, str):
            return [getattr(worker, method)(*args) for worker in self.workers]
        return [method(worker, *args) for worker in self.workers]

    def add_lora(self, request: Request) -> bool:
        return loading.add_lora(self._stock_add_lora, self, (request,), {})

    def _stock_add_lora(self, request: Request) -> bool:
        return all(self.collective_rpc("add_lora", (request,)))

    def remove_lora(self, number: int) -> bool:
        def stock(number: int) -> bool:
            return all(self.collective_rpc("remove_lora", (number,)))

        return loading.remove_lora(stock, self, (number,), {})

    def adapters(self) -> list[dict[int, str]]:
        """Return per worker its adapters' paths; check that none is left prepared."""
        assert not any(prepared(worker) for worker in self.workers)
        return [{i: model.path for i, model in w.models.items()} for w in self.workers]


class EngineRequest(SimpleNamespace):
    """Stands in for a ``Request`` of the engine core; hashed by identity, as vLLM's is."""

    __hash__ = object.__hash__


class Engine:
    """An engine core whose scheduler runs requests for as many steps as they ask for.

    Attributes:
        max_loras: adapters of one step.
        finished: ids of the requests that have run for all their steps.
        blocked: ids of the requests that wait for something else than a place, such as a grammar.
    """

    def __init__(
        self,
        *workers: Worker,
        max_loras: int = 2,
        max_cpu_loras: int = 2,
        in_process: bool = False,
        has_skipped_queue: bool = False,
    ) -> None:
        self.model_executor = Executor(*workers, max_loras=max_loras, max_cpu_loras=max_cpu_loras)
        self.scheduler = SimpleNamespace(
            running=[],
            waiting=create_request_queue(SchedulingPolicy.FCFS),
            requests={},
            max_num_running_reqs=8,
            lora_config=self.model_executor.vllm_config.lora_config,
            schedule=self._schedule,
        )
        # vLLM 0.18.0 to 0.26.0: requests that a step has skipped.
        self._skipped = self.scheduler.waiting
        if has_skipped_queue:
            self._skipped = create_request_queue(SchedulingPolicy.FCFS)
            self.scheduler.skipped_waiting = self._skipped
        if not in_process:
            self.output_queue: queue.Queue[Any] = queue.Queue()
        self.finished: list[str] = []
        self.blocked: set[str] = set()
        self.random = Random(0)
        self._count = 0

    def add_request(
        self, lora_request: Request | None, steps: int = 1, is_blocked: bool = False
    ) -> str:
        self._count += 1
        status = RequestStatus.WAITING_FOR_REMOTE_KVS if is_blocked else RequestStatus.WAITING
        request = EngineRequest(
            request_id=f"r{self._count}",
            client_index=3,
            lora_request=lora_request,
            steps=steps,
            status=status,
        )
        if is_blocked:
            self.blocked.add(request.request_id)
        requests.add_request(self._stock_add_request, self, (request,), {})
        return request.request_id

    def _stock_add_request(self, request: Any) -> None:
        self.scheduler.requests[request.request_id] = request
        self.scheduler.waiting.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        lost = [self.scheduler.requests.pop(request_id) for request_id in request_ids]
        self.scheduler.running[:] = [r for r in self.scheduler.running if r not in lost]
        for group in (self.scheduler.waiting, self._skipped):
            group.remove_requests(lost)

    def step(self) -> None:
        requests.step(self._stock_step, self, (), {})

    def _stock_step(self) -> None:
        """Schedule as vLLM does, and have every worker load what it lacks, in any order."""
        self.scheduler.schedule()
        running = self.scheduler.running
        by_id = {r.lora_request.lora_int_id: r.lora_request for r in running if r.lora_request}
        for worker in self.model_executor.workers:
            worker.run(self.random.sample(list(by_id.values()), len(by_id)))
        for request in list(running):
            request.steps -= 1
            if not request.steps:
                running.remove(request)
                del self.scheduler.requests[request.request_id]
                self.finished.append(request.request_id)

    def _schedule(self) -> None:
        scheduler, skipped = self.scheduler, []
        running = scheduler.running
        adapters = {r.lora_request.lora_int_id for r in running if r.lora_request}
        while len(running) < scheduler.max_num_running_reqs:
            queue = self._skipped or scheduler.waiting
            if not queue:
                break
            request = queue.pop_request()
            number = request.lora_request and request.lora_request.lora_int_id
            is_full = len(adapters) == scheduler.lora_config.max_loras
            if request.request_id in self.blocked or (number not in {*adapters, None} and is_full):
                skipped.append(request)
                continue
            if number:
                adapters.add(number)
            request.status = RequestStatus.RUNNING
            running.append(request)
        for request in reversed(skipped):
            self._skipped.prepend_request(request)

    def answers(self) -> dict[str, str]:
        """Return the errors that have been sent to the client: request's id -> stop reason."""
        found = {}
        while not self.output_queue.empty():
            client, outputs = self.output_queue.get_nowait()
            assert client == 3
            [output] = outputs.outputs
            assert str(output.finish_reason) == "error"
            assert outputs.finished_requests == {output.request_id}
            found[output.request_id] = output.stop_reason
        return found
