"""A request that fails raises an error with the reason in its caller."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.engine import clients
from vllm_nway_lora.engine.requests import REFUSED

pytest.importorskip("vllm")


def output(request_id: str, stop_reason: Any = None) -> SimpleNamespace:
    return SimpleNamespace(request_id=request_id, stop_reason=stop_reason)


class Processor:
    """An output processor with requests ``a`` and ``b``."""

    def __init__(self, queue: Any = None) -> None:
        self.request_states = {name: SimpleNamespace(queue=queue) for name in "ab"}
        self.processed: list[str] = []

    def process(self, engine_core_outputs: list[Any], timestamp: float = 0.0) -> list[str]:
        assert timestamp == 1.5
        self.processed += [output.request_id for output in engine_core_outputs]
        return self.processed

    def abort_requests(self, request_ids: list[str], internal: bool) -> None:
        assert internal
        for request_id in request_ids:
            del self.request_states[request_id]


def process(processor: Processor, *outputs: Any) -> Any:
    return clients.process_outputs(processor.process, processor, (list(outputs), 1.5), {})


@pytest.mark.parametrize("reason", [None, 7, "stop", "vllm"])
def test_other_outputs_are_processed_unchanged(reason: Any) -> None:
    assert process(Processor(), output("a", reason), output("b")) == ["a", "b"]


def test_awaiting_caller_gets_the_error_from_generate() -> None:
    import vllm.v1.engine.async_llm as async_llm
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    async def run() -> None:
        collector = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        processor = Processor(collector)
        assert process(processor, output("a", REFUSED + "no z"), output("b")) == ["b"]
        assert list(processor.request_states) == ["b"]
        with pytest.raises(async_llm.InputStreamError) as error:
            await collector.get()
        assert isinstance(error.value.cause, AdapterError)
        assert str(error.value.cause) == "no z"

    asyncio.run(run())


def test_caller_of_step_gets_the_error() -> None:
    processor = Processor()
    with pytest.raises(AdapterError, match="^no z$"):
        process(processor, output("a", REFUSED + "no z"))
    assert list(processor.request_states) == ["b"]


def test_error_of_a_caller_that_has_gone_is_dropped() -> None:
    assert process(Processor(), output("gone", REFUSED + "no z"), output("b")) == ["b"]


def test_refused_request_leaves_the_callers_state() -> None:
    processor = Processor()
    engine = SimpleNamespace(output_processor=processor)

    def fail() -> None:
        error = AdapterError("no z")
        error.request_ids = ("a",)
        raise error

    with pytest.raises(AdapterError, match="^no z$"):
        clients.forget_refused(fail, engine, (), {})
    assert list(processor.request_states) == ["b"]
    assert clients.forget_refused(lambda: "id", engine, (), {}) == "id"


def test_failed_generate_aborts_its_other_requests() -> None:
    aborted: list[str] = []
    engine = SimpleNamespace(
        output_processor=Processor(),
        abort_request=lambda request_ids, internal: aborted.extend(request_ids),
    )

    def fail() -> None:
        raise AdapterError("no z")

    with pytest.raises(AdapterError, match="^no z$"):
        clients.run_engine(fail, SimpleNamespace(llm_engine=engine), (), {})
    assert aborted == ["a", "b"]
