"""All ranks or none, requests that fail alone, ranks that must agree: on executors of plain Python."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import evaluate

import vllm_nway_lora
from vllm_nway_lora import containment
from vllm_nway_lora.containment import AdapterError, RankError


class Request(SimpleNamespace):
    """A ``LoRARequest``."""

    def __init__(self, path: Path | str = "/nowhere", *, number: int = 1, inplace: bool = False):
        super().__init__(
            lora_name=f"a{number}", lora_int_id=number, lora_path=str(path), load_inplace=inplace
        )


class Worker:
    """A worker whose manager loads what ``fails`` lets it, and keeps what it has in ``adapters``."""

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
            prepared, adapter = getattr(self, containment.PREPARED)
            assert prepared is request
            self.adapters.pop(request.lora_int_id, None)
            # As vLLM to 0.32.0 does: marked as the adapter's before it is written.
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
        return containment.add_lora(None, self, (request,), {})

    def adapters(self) -> list[dict[int, str]]:
        assert not any(hasattr(worker, containment.PREPARED) for worker in self.workers)
        return [worker.adapters for worker in self.workers]


class TestAddLora:
    def test_loads_once_on_each_rank(self) -> None:
        executor = Executor(Worker(), Worker())
        assert executor.add_lora(Request("/a"))
        assert executor.adapters() == [{1: "/a"}] * 2
        assert executor.add_lora(Request("/b"))  # there already
        assert executor.adapters() == [{1: "/a"}] * 2
        assert executor.add_lora(Request("/b", inplace=True))
        assert executor.adapters() == [{1: "/b"}] * 2
        assert [worker.loads for worker in executor.workers] == [2, 2]

    def test_what_all_ranks_say_is_said_once(self) -> None:
        executor = Executor(Worker(fails="no z"), Worker(fails="no z"))
        with pytest.raises(AdapterError, match="^no z$"):
            executor.add_lora(Request())
        assert executor.adapters() == [{}, {}]

    def test_one_rank_refuses_for_all_and_the_old_adapter_stays(self) -> None:
        executor = Executor(Worker(), Worker(), Worker())
        executor.add_lora(Request("/old"))
        executor.workers[1].fails = "no z."
        words = "On rank 0, 2 of 3: no error. On rank 1 of 3: no z."
        with pytest.raises(AdapterError) as error:
            executor.add_lora(Request("/new", inplace=True))
        assert str(error.value) == words
        assert executor.adapters() == [{1: "/old"}] * 3

    def test_a_rank_that_breaks_while_writing_takes_the_adapter_from_all(self) -> None:
        executor = Executor(Worker(), Worker(breaks="full"))
        with pytest.raises(AdapterError, match="On rank 1 of 2: MemoryError: full. No rank has"):
            executor.add_lora(Request())
        assert executor.adapters() == [{}, {}]

    def test_workers_without_such_a_manager_are_asked_as_vllm_would(self) -> None:
        worker = SimpleNamespace(add_lora=lambda request: True)
        assert Executor(worker).add_lora(Request())  # type: ignore[arg-type]


class Engine:
    def __init__(self, *workers: Worker) -> None:
        self.model_executor = Executor(*workers)
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.scheduled: list[Any] = []

    def add_request(self, lora_request: Request | None) -> None:
        request = SimpleNamespace(request_id="r", client_index=3, lora_request=lora_request)
        containment.add_request(self.scheduled.append, self, (request,), {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_model.safetensors").write_text("one")
    return tmp_path


class TestAddRequest:
    def test_costs_nothing_without_lora_or_once_loaded(self, folder: Path) -> None:
        engine = Engine(Worker())
        engine.add_request(None)
        assert engine.model_executor.calls == 0
        engine.add_request(Request(folder))
        calls = engine.model_executor.calls
        engine.add_request(Request(folder))
        assert engine.model_executor.calls == calls > 0
        assert len(engine.scheduled) == 3

    def test_a_refused_adapter_fails_its_request_alone(self, folder: Path) -> None:
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
    def test_changed_files_are_no_risk_to_a_step(self, folder: Path, change: str) -> None:
        engine = Engine(Worker())
        engine.add_request(Request(folder))
        [worker] = engine.model_executor.workers
        file = folder / "adapter_model.safetensors"
        file.write_text("other") if change == "write" else file.unlink()
        worker.fails = "gone"
        engine.add_request(Request(folder))  # held still: served
        worker.adapters.clear()  # evicted
        engine.add_request(Request(folder))
        assert len(engine.scheduled) == 2
        assert engine.output_queue.qsize() == 1

    def test_inplace_is_done_once_per_request(self, folder: Path) -> None:
        engine = Engine(Worker())
        for _ in range(2):
            engine.add_request(Request(folder, inplace=True))
        assert engine.model_executor.workers[0].loads == 2
        assert not any(request.lora_request.load_inplace for request in engine.scheduled)

    def test_an_engine_that_cannot_answer_is_left_alone(self) -> None:
        engine = Engine(Worker(fails="no z"))
        del engine.output_queue
        engine.add_request(Request())
        assert len(engine.scheduled) == 1


class TestAgreement:
    here = (vllm_nway_lora.__version__, "1", ("a", "b"))

    @pytest.fixture(autouse=True)
    def default_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("VLLM_NWAY_LORA", raising=False)

    def test_agreement(self) -> None:
        assert containment.compare_ranks([self.here] * 3) == ""

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (None, "rank 1: not loaded"),
            (("0.0.1", "1", ("a", "b")), "rank 1: 0.0.1 (VLLM_NWAY_LORA=1; patches: a, b)"),
            ((here[0], "0", ()), "(VLLM_NWAY_LORA=0; patches: none)"),
            ((here[0], "1", ("a",)), "(VLLM_NWAY_LORA=1; patches: a)"),
        ],
    )
    def test_difference(self, other: Any, words: str) -> None:
        message = containment.compare_ranks([self.here, other])
        assert words in message
        assert "Install the same version on every node" in message

    def test_all_ranks_alike_but_not_as_the_engine(self) -> None:
        assert "rank 0: not loaded; rank 1: not loaded" in containment.compare_ranks([None, None])

    def test_the_question_can_be_asked_where_the_package_is_not_installed(self) -> None:
        cloudpickle = pytest.importorskip("cloudpickle")  # vLLM's own way to its workers
        code = """
            import json, pickle, sys
            sys.modules["vllm_nway_lora"] = None  # an import of it fails
            print(json.dumps(pickle.loads(bytes.fromhex(sys.argv[1]))("a worker")))
        """
        question = cloudpickle.dumps(containment._reporter()).hex()
        assert evaluate(code, question) is None

    def test_start(self) -> None:
        executor = Executor(Worker())
        executor.shutdown = lambda: None  # type: ignore[attr-defined]
        engine = SimpleNamespace(
            vllm_config=SimpleNamespace(lora_config=None), model_executor=executor
        )
        containment.start_engine(lambda: None, engine, (), {})
        assert executor.calls == 0  # no LoRA, no question
        engine.vllm_config.lora_config = object()
        executor.collective_rpc = lambda method: [None]  # type: ignore[assignment,misc]
        with pytest.raises(RankError, match="rank 0: not loaded"):
            containment.start_engine(lambda: None, engine, (), {})


def test_the_server_forgets_load_inplace() -> None:
    stored = Request(inplace=True)
    serving = SimpleNamespace(lora_requests={"a1": stored})

    async def load(request: Any) -> str:
        return f"loaded {request.lora_name}"

    request = SimpleNamespace(lora_name="a1")
    coroutine = containment.reset_load_inplace(load, serving, (request,), {})
    assert asyncio.run(coroutine) == "loaded a1"
    assert not stored.load_inplace
