# SPDX-License-Identifier: Apache-2.0
"""Load an adapter on every rank or on none.

Runs in the engine core, except the functions with a parameter ``worker``, which the executor runs in
each worker.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import (
    Source,
    get_source,
    keep_prepared,
    prepared,
    set_source,
    source_of,
)
from vllm_nway_lora.engine.prefix_cache import Files, note_weights
from vllm_nway_lora.engine.residency import find_residency, get_residency

logger = logging.getLogger("vllm.nway_lora")


class Status(enum.Enum):
    """What a worker has of an adapter."""

    #: It is registered in vLLM's LoRA manager.
    RESIDENT = "resident"
    #: It is loaded and validated, and is not registered yet.
    PREPARED = "prepared"
    #: As PREPARED, and an older version is resident (``load_inplace``).
    REPLACES = "replaces"
    #: It was not validated, because as many adapters are prepared as there are slots.
    NO_ROOM = "no room"
    #: The worker has no LoRA manager of vLLM's kind.
    FOREIGN = "foreign"
    FAILED = "failed"


class Reply(NamedTuple):
    """A worker's answer.

    Attributes:
        status: what it has of the adapter.
        error: the error's text; empty without an error.
        resident: ids of the adapters in vLLM's LoRA manager.
        prepared: ids of the prepared adapters.
        files: the files that were read; None without a local folder, or if none were read.
        is_new: whether this worker has these weights under a ``LoRARequest`` for the first time.
    """

    status: Status
    error: str = ""
    resident: tuple[int, ...] = ()
    prepared: tuple[int, ...] = ()
    files: Files = None
    is_new: bool = False


def add_lora(wrapped: Any, executor: Any, args: Any, kwargs: Any) -> bool:
    """Load an adapter on every rank or on none; wraps ``Executor.add_lora``.

    vLLM (0.17.0 to 0.33.0) raises at the first rank that fails and leaves the other ranks' replies
    in their queues, where the next call reads them as its own: the next good adapter fails, and
    under pipeline parallelism the engine ends. Here each rank returns its error instead of raising
    it. All ranks load and validate the adapter before any rank makes room for it.

    Raises:
        AdapterError: a rank failed; the message names the rank and the reason.
    """
    lora_request = args[0] if args else kwargs["lora_request"]
    replies = prepare(executor, lora_request, None)
    if any(reply.status is Status.FOREIGN for reply in replies):
        return bool(wrapped(*args, **kwargs))
    if error := join_errors(replies):
        raise AdapterError(error)
    return commit(executor, lora_request)


def prepare(
    executor: Any,
    lora_request: Any,
    wanted: Collection[Source] | None,
    needed: Collection[Source] = (),
) -> Sequence[Reply]:
    """Have every rank load and validate an adapter without making room for it.

    If a rank fails, all ranks drop the adapter. Updates the prefix cache's label of the adapter.

    Args:
        executor: the engine's executor.
        lora_request: the ``LoRARequest``.
        wanted: the adapters of the unfinished requests; the ranks drop other prepared adapters, and
            do not look at the adapter if its place is taken. None to look at it in any case.
        needed: the adapters of the next step; if the adapter is one of them, prepared adapters that
            are not make room for it.
    """
    replies: list[Reply] = executor.collective_rpc(_prepare, args=(lora_request, wanted, needed))
    if any(reply.error for reply in replies):
        executor.collective_rpc(_forget, args=(source_of(lora_request),))
    elif replies and replies[0].is_new and note_weights(lora_request.lora_name, replies[0].files):
        get_residency(executor).is_relabelled = True
    return replies


def commit(executor: Any, lora_request: Any) -> bool:
    """Have every rank add a prepared adapter, which may evict another; remove it if a rank fails.

    Raises:
        AdapterError: a rank failed. No rank has the adapter then.
    """
    added = executor.collective_rpc(_commit, args=(lora_request,))
    replies = [reply for _, reply in added]
    residency = get_residency(executor)
    if error := join_errors(replies):
        executor.collective_rpc(_withdraw, args=(lora_request.lora_int_id,))
        residency.forget(lora_request.lora_int_id)
        raise AdapterError(
            f"{error} Adapter {lora_request.lora_name!r} has been removed from every rank."
        )
    residency.learn(replies, source_of(lora_request))
    return all(result for result, _ in added)


def remove_lora(wrapped: Any, executor: Any, args: Any, kwargs: Any) -> bool:
    """Note that an adapter is removed; wraps ``Executor.remove_lora``."""
    residency = find_residency(executor)
    if residency is not None:
        residency.forget(args[0] if args else kwargs["lora_id"])
    return bool(wrapped(*args, **kwargs))


def join_errors(replies: Sequence[Reply]) -> str:
    """Return the ranks' errors, each of them once, with its ranks if the ranks' errors differ."""
    ranks: dict[str, list[str]] = {}
    for rank, reply in enumerate(replies):
        ranks.setdefault(reply.error or "no error", []).append(str(rank))
    if len(ranks) == 1:
        return replies[0].error
    return " ".join(
        f"On rank {', '.join(of)} of {len(replies)}: {error.rstrip('.')}."
        for error, of in ranks.items()
    )


def describe_error(error: Exception) -> str:
    """Return an error as text; its class may be one that cannot be pickled."""
    return str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"


def _lora_manager(worker: Any) -> Any:
    """Return the ``WorkerLoRAManager`` of a worker, or None if it has none of vLLM's kind."""
    from vllm_nway_lora.adapters import hooks

    manager = getattr(getattr(worker, "model_runner", None), "lora_manager", None)
    return manager if hooks.owns_manager(manager) else None


def _prepare(
    worker: Any,
    lora_request: Any,
    wanted: Collection[Source] | None,
    needed: Collection[Source],
) -> Reply:
    """Load and validate an adapter without making room for it."""
    manager = _lora_manager(worker)
    if manager is None:
        return Reply(Status.FOREIGN)
    source = source_of(lora_request)
    try:
        return _look(manager, lora_request, source, wanted, needed)
    except Exception as error:
        return _reply(manager, Status.FAILED, error=describe_error(error))


def _look(
    manager: Any,
    lora_request: Any,
    source: Source,
    wanted: Collection[Source] | None,
    needed: Collection[Source],
) -> Reply:
    if wanted is not None:
        keep_prepared(manager, wanted)
    models = manager._adapter_manager.list_adapters()
    resident = models.get(source.id)
    is_replaced = resident is not None and getattr(lora_request, "load_inplace", False)
    if resident is not None and not is_replaced:
        known = get_source(resident)
        if known is not None and known != source:
            raise AdapterError(
                f"LoRA adapter {source.name!r} ({source.path}) is refused: its id {source.id} belongs "
                f"to the loaded adapter {known.name!r} ({known.path}). Use another lora_int_id, remove "
                "the loaded adapter first, or set load_inplace"
            )
        set_source(resident, source)
        return _reply(manager, Status.RESIDENT, is_new=known is None)
    store = prepared(manager)
    if source in store and not is_replaced:
        return _reply(manager, Status.PREPARED)
    slots = manager._adapter_manager.lora_slots
    if source in needed and len(store) >= slots:
        keep_prepared(manager, needed)
    if wanted is not None and len(store) >= slots:
        return _reply(manager, Status.NO_ROOM)
    files = list_files(source.path)
    store.pop(source, None)
    adapter = manager._load_adapter(lora_request)
    set_source(adapter, source)
    store[source] = adapter
    status = Status.REPLACES if is_replaced else Status.PREPARED
    return _reply(manager, status, files=files, is_new=True)


def _reply(manager: Any, status: Status, **fields: Any) -> Reply:
    resident = tuple(manager._adapter_manager.list_adapters())
    return Reply(
        status, resident=resident, prepared=tuple(s.id for s in prepared(manager)), **fields
    )


def _commit(worker: Any, lora_request: Any) -> tuple[bool, Reply]:
    """Add the prepared adapter; return the result of the worker's ``add_lora``, and the reply."""
    manager = _lora_manager(worker)
    try:
        result = bool(worker.add_lora(lora_request))
        # Until 0.25.1 vLLM keeps the batch's token mapping although the slots have changed
        # (vllm-project/vllm#47724): requests in flight would read each other's slots.
        manager._adapter_manager._last_mapping = None
        return result, _reply(manager, Status.RESIDENT)
    except Exception as error:
        logger.exception("Adding adapter %s failed", lora_request.lora_name)
        return False, _reply(manager, Status.FAILED, error=describe_error(error))
    finally:
        _forget(worker, source_of(lora_request))


def _forget(worker: Any, source: Source) -> None:
    manager = _lora_manager(worker)
    if manager is not None:
        prepared(manager).pop(source, None)


def _withdraw(worker: Any, lora_id: int) -> None:
    # Until 0.32.0 vLLM assigns a slot to the adapter before it writes the slot. Free that slot.
    manager = _lora_manager(worker)
    if manager is not None:
        manager.remove_adapter(lora_id)


def list_files(path: str) -> Files:
    """Return the files of an adapter whose names begin with ``adapter_``."""
    try:
        with os.scandir(os.path.expanduser(path)) as entries:
            found = [
                (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in entries
                if entry.name.startswith("adapter_")
            ]
    except OSError:
        return None
    return tuple(sorted(found))
