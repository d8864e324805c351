# SPDX-License-Identifier: Apache-2.0
"""Requests whose adapter cannot be loaded: they fail, and the engine goes on. Engine core.

An adapter is looked at when its request arrives: every rank loads and validates it, and no other
adapter gives up its slot or its place. vLLM makes room in the step that schedules the request. An
adapter that may have been evicted or removed since is looked at again before that step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import Source, source_of
from vllm_nway_lora.engine.loading import Status, commit, describe_error, join_errors, prepare
from vllm_nway_lora.engine.prefix_cache import rehash
from vllm_nway_lora.engine.residency import find_residency, get_residency

logger = logging.getLogger("vllm.nway_lora")

#: Begins the stop reason of a request that fails, which carries the error to the client's process.
REFUSED = "vllm-nway-lora: "


def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Refuse a request whose adapter cannot be loaded; wraps ``EngineCore.add_request``.

    vLLM loads an adapter that it does not hold within a model step, where a failure ends the engine.

    Raises:
        AdapterError: the adapter cannot be loaded, and the engine runs in the caller's process. An
            engine in a process of its own answers the request with the error instead.
    """
    request = args[0] if args else kwargs["request"]
    if request.lora_request is not None:
        error = _look(engine, request.lora_request)
        if error:
            _fail(engine, {request.request_id: error}, [request])
            return None
        rehash(engine, request)
    return wrapped(*args, **kwargs)


def step(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Look again at adapters that may be gone; wraps ``EngineCore.step`` and its batch-queue twin.

    Raises:
        AdapterError: as :func:`add_request`.
    """
    residency = find_residency(engine.model_executor)
    if residency is not None:
        if residency.is_relabelled:
            residency.is_relabelled = False
            for request in _with_lora(engine.scheduler.waiting):
                rehash(engine, request)
        if residency.is_stale:
            _look_again(engine)
    return wrapped(*args, **kwargs)


def collective_rpc(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Forget what is known of the workers; wraps ``EngineCore.collective_rpc``, which users call."""
    residency = find_residency(engine.model_executor)
    try:
        return wrapped(*args, **kwargs)
    finally:
        if residency is not None:
            residency.forget_all()


def _look(engine: Any, lora_request: Any) -> str:
    """Have every rank look at an adapter that is not known to be there; return the error, if any."""
    executor, source = engine.model_executor, source_of(lora_request)
    residency = get_residency(executor)
    is_replaced = getattr(lora_request, "load_inplace", False)
    if residency.is_ready(source) and not is_replaced:
        return ""
    residency.in_use = {r.lora_request.lora_int_id for r in _with_lora(engine.scheduler.running)}
    try:
        replies = prepare(executor, lora_request, {source, *_wanted(engine.scheduler)})
    except Exception as failed:  # a call to the workers that fails must not end the engine here
        return describe_error(failed)
    if any(reply.status is Status.FOREIGN for reply in replies):
        residency.is_foreign = True
        return ""
    if error := join_errors(replies):
        return error
    if is_replaced:
        if any(reply.status is Status.REPLACES for reply in replies):
            try:
                commit(executor, lora_request)
            except AdapterError as failed:
                return str(failed)
        # The flag is done with: every later step would reload the adapter.
        lora_request.load_inplace = False
    if any(reply.status is Status.NO_ROOM for reply in replies):
        residency.is_stale = True  # to be looked at before the step that schedules the request
    else:
        residency.learn(source, replies)
    return ""


def _look_again(engine: Any) -> None:
    """Look at the adapters of the requests that the next step may run; fail those without one."""
    residency = get_residency(engine.model_executor)
    residency.is_stale = False
    errors: dict[Source, str] = {}
    failed = {}
    for request in list(_next_requests(engine)):
        source = source_of(request.lora_request)
        if source not in errors:
            errors[source] = _look(engine, request.lora_request)
        if errors[source]:
            failed[request.request_id] = errors[source]
    residency.is_stale |= any(
        not residency.is_ready(source_of(request.lora_request))
        for request in _with_lora(engine.scheduler.waiting)
    )
    if failed:
        scheduler = engine.scheduler
        requests = [
            r for r in chain(scheduler.running, scheduler.waiting) if r.request_id in failed
        ]
        engine.abort_requests(list(failed))
        _fail(engine, failed, requests)


def _next_requests(engine: Any) -> Iterator[Any]:
    """Yield the running requests with LoRA, and the waiting ones that the next step may schedule.

    The scheduler runs at most ``max_loras`` adapters at a time (v1/core/sched/scheduler.py, 0.17.0 to
    0.33.0).
    """
    scheduler = engine.scheduler
    running = list(_with_lora(scheduler.running))
    yield from running
    adapters = {request.lora_request.lora_int_id for request in running}
    if len(scheduler.running) < scheduler.max_num_running_reqs:
        for request in _with_lora(scheduler.waiting):
            lora_id = request.lora_request.lora_int_id
            if lora_id in adapters or len(adapters) < scheduler.lora_config.max_loras:
                adapters.add(lora_id)
                yield request


def _with_lora(requests: Any) -> Iterator[Any]:
    return (request for request in requests if request.lora_request is not None)


def _wanted(scheduler: Any) -> Iterator[Source]:
    """Yield the adapters of the unfinished requests."""
    return (
        source_of(request.lora_request)
        for request in _with_lora(chain(scheduler.running, scheduler.waiting))
    )


def _fail(engine: Any, errors: dict[str, str], requests: list[Any]) -> None:
    """Answer requests with their errors, or raise one in the caller's process."""
    for request_id, error in errors.items():
        logger.error("Request %s fails: %s", request_id, error)
    if not hasattr(engine, "output_queue"):
        failure = AdapterError(" ".join(dict.fromkeys(errors.values())))
        failure.request_ids = tuple(errors)
        raise failure
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    for request in requests:
        request_id = request.request_id
        output = EngineCoreOutput(
            request_id,
            [],
            finish_reason=FinishReason.ERROR,
            stop_reason=REFUSED + errors[request_id],
        )
        outputs = EngineCoreOutputs(outputs=[output], finished_requests={request_id})
        engine.output_queue.put_nowait((request.client_index, outputs))
