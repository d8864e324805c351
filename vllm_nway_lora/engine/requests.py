# SPDX-License-Identifier: Apache-2.0
"""Requests whose adapter cannot be loaded: they fail, and the engine goes on. Engine core."""

from __future__ import annotations

import logging
from typing import Any

from vllm_nway_lora.engine.loading import describe_error, get_loaded, list_files

logger = logging.getLogger("vllm.nway_lora")


def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Refuse a request whose adapter cannot be loaded; wraps ``EngineCore.add_request``.

    vLLM loads an adapter that it does not hold within a model step, where a failure ends the engine.
    An adapter that was never loaded here, or whose files have changed since, is therefore loaded
    before its request is scheduled. If that fails, only the request fails (finish reason "error",
    HTTP 500). An engine without a process of its own cannot answer a single request: it is not
    changed.
    """
    request = args[0] if args else kwargs["request"]
    lora_request = request.lora_request
    if lora_request is not None and hasattr(engine, "output_queue"):
        error = _load_if_needed(engine.model_executor, lora_request)
        if error:
            logger.error("Request %s fails: %s", request.request_id, error)
            _answer_with_error(engine, request)
            return None
    return wrapped(*args, **kwargs)


def _load_if_needed(executor: Any, lora_request: Any) -> str:
    """Load a request's adapter if a model step might fail to; return the error message, if any."""
    lora_id = lora_request.lora_int_id
    files = get_loaded(executor).files
    if (
        not lora_request.load_inplace
        and lora_id in files
        and files[lora_id] == list_files(lora_request.lora_path)
    ):
        return ""
    try:
        executor.add_lora(lora_request)
    except Exception as error:
        return describe_error(error)
    # The flag is done with: every later step would reload the adapter.
    lora_request.load_inplace = False
    return ""


def _answer_with_error(engine: Any, request: Any) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    request_id = request.request_id
    outputs = EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)],
        finished_requests={request_id},
    )
    engine.output_queue.put_nowait((request.client_index, outputs))
