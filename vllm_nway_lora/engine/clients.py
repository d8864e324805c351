# SPDX-License-Identifier: Apache-2.0
"""The callers of an engine: a request that fails raises an error with the reason.

Runs in the process of the API server, of ``AsyncLLM`` or of ``LLM``.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.engine.requests import REFUSED


def process_outputs(wrapped: Any, processor: Any, args: Any, kwargs: Any) -> Any:
    """Raise the errors of failed requests in their callers; wraps ``OutputProcessor.process_outputs``.

    A caller that awaits its request gets the error from its ``generate``.

    Raises:
        AdapterError: a request without such a caller has failed (``LLMEngine.step``). The engine core
            sends it in a message of its own, so no other output is lost.
    """
    name = "engine_core_outputs"
    outputs = args[0] if args else kwargs[name]
    refused = [output for output in outputs if _is_refused(output)]
    if not refused:
        return wrapped(*args, **kwargs)
    others = [output for output in outputs if not _is_refused(output)]
    result = wrapped(others, *args[1:], **{k: v for k, v in kwargs.items() if k != name})
    raised = None
    for output in refused:
        state = processor.request_states.get(output.request_id)
        if state is None:  # the caller has gone
            continue
        error = AdapterError(output.stop_reason.removeprefix(REFUSED))
        if state.queue is None:
            raised = error
        else:
            # vLLM's `generate` raises the cause of this class as it is, and wraps most others.
            wrapper = sys.modules["vllm.v1.engine.async_llm"].InputStreamError
            state.queue.put(wrapper(error))
        processor.abort_requests([output.request_id], internal=True)
    if raised is not None:
        raise raised
    return result


def _is_refused(output: Any) -> bool:
    reason = output.stop_reason
    return isinstance(reason, str) and reason.startswith(REFUSED)


def forget_refused(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Remove refused requests from the caller's state; wraps ``LLMEngine.add_request`` and ``step``.

    Without this, the next ``generate`` would wait for them forever.

    Raises:
        AdapterError: as the wrapped method.
    """
    try:
        return wrapped(*args, **kwargs)
    except AdapterError as error:
        engine.output_processor.abort_requests(error.request_ids, internal=True)
        raise


def run_engine(wrapped: Any, llm: Any, args: Any, kwargs: Any) -> Any:
    """Abort the other requests of a ``generate`` that raises; wraps ``LLM._run_engine``.

    The next ``generate`` would return their outputs otherwise.

    Raises:
        AdapterError: as the wrapped method.
    """
    try:
        return wrapped(*args, **kwargs)
    except AdapterError:
        unfinished = list(llm.llm_engine.output_processor.request_states)
        llm.llm_engine.abort_request(unfinished, internal=True)
        raise
