# SPDX-License-Identifier: Apache-2.0
"""Requests whose adapter cannot be loaded: they fail, and the engine goes on. Engine core.

When a request arrives, every rank loads and validates its adapter. No other adapter is evicted for it.
vLLM makes room in the step that schedules the request. If the adapter may have been evicted or removed
since, it is validated again before that step. Until then the scheduler does not see its requests.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import Source, source_of
from vllm_nway_lora.engine import queues
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
    """Run only requests whose adapter is there; wraps ``EngineCore.step`` and its batch-queue twin.

    Looks again at adapters that may be gone, and fails the requests whose adapter cannot be loaded.

    Raises:
        AdapterError: as :func:`add_request`.
    """
    residency = find_residency(engine.model_executor)
    if residency is None:
        return wrapped(*args, **kwargs)
    scheduler = engine.scheduler
    if residency.is_relabelled:
        residency.is_relabelled = False
        for request in queues.waiting(scheduler):
            rehash(engine, request)
    if residency.is_stale:
        _look_again(engine)
    if not (residency.is_stale or residency.may_evict):
        return wrapped(*args, **kwargs)
    with queues.watch_schedule(
        scheduler, lambda request: not residency.is_ready(source_of(request.lora_request))
    ) as used:
        result = wrapped(*args, **kwargs)
    residency.note_step(used)
    return result


def collective_rpc(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Forget what is known of the workers; wraps ``EngineCore.collective_rpc``, which users call."""
    residency = find_residency(engine.model_executor)
    try:
        return wrapped(*args, **kwargs)
    finally:
        if residency is not None:
            residency.forget_all()


def _look(engine: Any, lora_request: Any, needed: Collection[Source] = ()) -> str:
    """Have every rank load and validate an adapter unless all ranks have it; return the error, if any.

    Args:
        engine: the engine core.
        lora_request: the ``LoRARequest``.
        needed: the adapters of the next step. Only other adapters make room for this one.
    """
    executor, source = engine.model_executor, source_of(lora_request)
    residency = get_residency(executor)
    is_replaced = getattr(lora_request, "load_inplace", False)
    if residency.is_ready(source) and not is_replaced:
        return ""
    unfinished = {source_of(r.lora_request) for r in queues.unfinished(engine.scheduler)}
    try:
        replies = prepare(executor, lora_request, {source, *unfinished}, needed)
    except Exception as failed:  # a call to the workers that fails must not end the engine here
        return describe_error(failed)
    if any(reply.status is Status.FOREIGN for reply in replies):
        residency.is_foreign = True
        return ""
    if error := join_errors(replies):
        residency.learn(replies)
        return error
    if any(reply.status is Status.NO_ROOM for reply in replies):
        residency.learn(replies)
        residency.forget(source.id)
        residency.is_stale = True  # validated before the step that schedules the request
        return ""
    residency.learn(replies, source)
    if is_replaced:
        if any(reply.status is Status.REPLACES for reply in replies):
            try:
                commit(executor, lora_request)
            except AdapterError as failed:
                return str(failed)
        # Clear the flag: otherwise every later step reloads the adapter.
        lora_request.load_inplace = False
    return ""


def _look_again(engine: Any) -> None:
    """Look at the adapters of the requests that the next step may run; fail those without one."""
    scheduler, residency = engine.scheduler, get_residency(engine.model_executor)
    errors: dict[Source, str] = {}
    failed = {}
    requests = queues.next_requests(scheduler)
    needed: set[Source] = set()
    for request in requests:
        source = source_of(request.lora_request)
        needed.add(source)
        if not residency.is_ready(source) and residency.is_full(
            {s.id for s in needed} - {source.id}
        ):
            continue  # a step must use a prepared adapter first
        error = errors.get(source) or _look(engine, request.lora_request, needed)
        if error:
            errors[source] = failed[request.request_id] = error
    if failed:
        lost = [request for request in requests if request.request_id in failed]
        engine.abort_requests(list(failed))
    residency.is_stale = not all(
        residency.is_ready(source_of(request.lora_request))
        for request in queues.unfinished(scheduler)
    )
    if failed:
        _fail(engine, failed, lost)


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
