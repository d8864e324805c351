# SPDX-License-Identifier: Apache-2.0
"""Load an adapter on every rank or on none.

Runs in the engine core, except the functions with a parameter ``worker``, which the executor runs in
each worker.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.prepared import forget_prepared, set_prepared

logger = logging.getLogger("vllm.nway_lora")

_ATTRIBUTE = "_nway_lora_loaded"

#: Name, size in bytes and modification time in nanoseconds of an adapter's files, sorted; None if the
#: path is not a local folder.
Files = tuple[tuple[str, int, int], ...] | None


@dataclass
class LoadedAdapters:
    """The adapters that an executor has loaded, stored on one attribute of it.

    Attributes:
        files: adapter's id -> the files that it was loaded from.
    """

    files: dict[int, Files] = field(default_factory=dict)


def get_loaded(executor: Any) -> LoadedAdapters:
    """Return the record of an executor, created if need be."""
    if not hasattr(executor, _ATTRIBUTE):
        setattr(executor, _ATTRIBUTE, LoadedAdapters())
    loaded: LoadedAdapters = getattr(executor, _ATTRIBUTE)
    return loaded


def add_lora(_wrapped: Any, executor: Any, args: Any, kwargs: Any) -> bool:
    """Load an adapter on every rank or on none; replaces ``Executor.add_lora``.

    vLLM (0.17.0 to 0.33.0) raises at the first rank that fails and leaves the other ranks' replies
    in their queues, where the next call reads them as its own: the next good adapter fails, and
    under pipeline parallelism the engine ends. Here each rank returns its error instead of raising
    it. All ranks load and validate the adapter before any rank makes room for it.

    Raises:
        AdapterError: a rank failed; the message names the rank and the reason. Unless the message
            says otherwise, every rank still has its earlier adapters.
    """
    lora_request = args[0] if args else kwargs["lora_request"]
    prepared = executor.collective_rpc(_prepare, args=(lora_request,))
    errors = [error for _, error in prepared]
    if any(errors):
        executor.collective_rpc(_forget)
        raise AdapterError(_join_by_rank(errors))
    added = executor.collective_rpc(_commit, args=(lora_request,))
    errors = [error for _, error in added]
    if any(errors):
        executor.collective_rpc(_withdraw, args=(lora_request.lora_int_id,))
        raise AdapterError(
            f"{_join_by_rank(errors)} Adapter {lora_request.lora_name!r} has been removed from every rank."
        )
    if all(loaded for loaded, _ in prepared):
        get_loaded(executor).files[lora_request.lora_int_id] = list_files(lora_request.lora_path)
    return all(result for result, _ in added)


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


def describe_error(error: Exception) -> str:
    """Return an error as text; its class may be one that cannot be pickled."""
    return str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"


def _lora_manager(worker: Any) -> Any:
    """Return the ``WorkerLoRAManager`` of a worker, or None if it has none of vLLM's kind."""
    return getattr(getattr(worker, "model_runner", None), "lora_manager", None)


def _prepare(worker: Any, lora_request: Any) -> tuple[bool, str]:
    """Load and validate an adapter without making room for it; return (loaded, error message)."""
    manager = _lora_manager(worker)
    try:
        if manager is None or (
            lora_request.lora_int_id in manager.list_adapters() and not lora_request.load_inplace
        ):
            return False, ""
        set_prepared(manager, lora_request, manager._load_adapter(lora_request))
    except Exception as error:
        return False, describe_error(error)
    return True, ""


def _commit(worker: Any, lora_request: Any) -> tuple[bool, str]:
    """Add the prepared adapter; return (result of the worker's ``add_lora``, error message)."""
    try:
        return bool(worker.add_lora(lora_request)), ""
    except Exception as error:
        logger.exception("Adding adapter %s failed", lora_request.lora_name)
        return False, describe_error(error)
    finally:
        _forget(worker)


def _forget(worker: Any) -> None:
    forget_prepared(_lora_manager(worker))


def _withdraw(worker: Any, lora_id: int) -> None:
    # Until 0.32.0 vLLM assigns a slot to the adapter before it writes the slot. Free that slot.
    manager = _lora_manager(worker)
    if manager is not None:
        manager.remove_adapter(lora_id)


def _join_by_rank(errors: Sequence[str]) -> str:
    """Join the ranks' errors, each of them once, with its ranks if the ranks' errors differ."""
    ranks: dict[str, list[str]] = {}
    for rank, error in enumerate(errors):
        ranks.setdefault(error or "no error", []).append(str(rank))
    if len(ranks) == 1:
        return errors[0]
    return " ".join(
        f"On rank {', '.join(of)} of {len(errors)}: {error.rstrip('.')}."
        for error, of in ranks.items()
    )
