# SPDX-License-Identifier: Apache-2.0
"""A refused adapter stays a refusal: no stale replies, no half-written slot, no dead engine.

Runs in the engine-core process, but for the functions that take a ``worker``, which the executor
runs in each worker, and :func:`reset_load_inplace`, which runs in the API server. Imports neither
torch nor vLLM by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from vllm_nway_lora import __version__, settings

logger = logging.getLogger("vllm.nway_lora")

#: Where a worker's LoRA manager keeps what :func:`_prepare` loaded: ``(LoRARequest, LoRAModel)``.
PREPARED = "_nway_lora_prepared"

#: Where an executor remembers the files that each adapter was loaded from: id -> :func:`_files`.
_LOADED = "_nway_lora_loaded"


class AdapterError(ValueError):
    """An adapter that is refused, or that a rank could not load. The message says all."""


class RankError(RuntimeError):
    """The ranks of one engine do not run the same plugin."""


def add_lora(_wrapped: Any, executor: Any, args: Any, kwargs: Any) -> bool:
    """Load an adapter on every rank or on none; stands in for ``Executor.add_lora``.

    vLLM (0.17.0 to 0.33.0) raises at the first rank that fails and leaves the other ranks' replies
    in their queues, where the next call reads them as its own: the next good adapter fails, and
    under pipeline parallelism the engine ends. Here each rank returns its error instead of raising
    it. Adapters are loaded and checked on all ranks before any rank makes room for one.

    Raises:
        AdapterError: a rank failed; the message says which, and why. Unless it says otherwise,
            every rank serves what it served before.
    """
    lora_request = args[0] if args else kwargs["lora_request"]
    prepared = executor.collective_rpc(_prepare, args=(lora_request,))
    errors = [error for _, error in prepared]
    if any(errors):
        executor.collective_rpc(_forget)
        raise AdapterError(_by_rank(errors))
    added = executor.collective_rpc(_commit, args=(lora_request,))
    errors = [error for _, error in added]
    if any(errors):
        executor.collective_rpc(_withdraw, args=(lora_request.lora_int_id,))
        raise AdapterError(
            f"{_by_rank(errors)} No rank has adapter {lora_request.lora_name!r} any more."
        )
    if all(loaded for loaded, _ in prepared):
        _loaded_files(executor)[lora_request.lora_int_id] = _files(lora_request.lora_path)
    return all(result for result, _ in added)


def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Refuse a request whose adapter cannot be loaded; wraps ``EngineCore.add_request``.

    vLLM loads an adapter that it does not hold within a model step, where a failure ends the engine.
    So one that was never loaded here, or whose files have changed since, is loaded before its
    request is scheduled; if that fails, the request alone fails (finish reason "error", HTTP 500).
    An engine without a process of its own has no way to answer one request, and is left alone.
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


def start_engine(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> None:
    """Start, then compare the ranks; wraps ``EngineCore.__init__``.

    Raises:
        RankError: LoRA is on and a worker lacks the plugin, or has another version or setting.
    """
    wrapped(*args, **kwargs)
    if engine.vllm_config.lora_config is not None:
        reports = engine.model_executor.collective_rpc(_reporter())
        message = compare_ranks(reports)
        if message:
            engine.model_executor.shutdown()
            raise RankError(message)


async def reset_load_inplace(wrapped: Any, serving: Any, args: Any, kwargs: Any) -> Any:
    """Forget ``load_inplace`` once it is done; wraps ``OpenAIServingModels.load_lora_adapter``.

    vLLM to 0.32.0 keeps the flag in the request that it stores for the adapter's name, and every
    step of every later request reloads the adapter from its files (mended in 0.33.0).
    """
    result = await wrapped(*args, **kwargs)
    request = args[0] if args else kwargs["request"]
    stored = serving.lora_requests.get(request.lora_name)
    if stored is not None and stored.load_inplace:
        stored.load_inplace = False
    return result


def compare_ranks(reports: Sequence[tuple[str, str, tuple[str, ...]] | None]) -> str:
    """Return what is wrong with the ranks' reports (see :func:`_reporter`); empty if they agree.

    Args:
        reports: per rank ``(plugin version, VLLM_NWAY_LORA, names of patches in place)``, or None
            where the plugin was not loaded.
    """
    here = (__version__, settings.read_mode().value)
    if all(report and report[:2] == here for report in reports) and len(set(reports)) == 1:
        return ""
    ranks = "; ".join(
        f"rank {rank}: "
        + (
            f"{report[0]} ({settings.VARIABLE}={report[1]}; patches: {', '.join(report[2]) or 'none'})"
            if report
            else "not loaded"
        )
        for rank, report in enumerate(reports)
    )
    return (
        f"vllm-nway-lora differs between the processes of this engine, whose ranks would compute "
        f"LoRA differently. Engine core: {here[0]} ({settings.VARIABLE}={here[1]}); {ranks}. Install "
        f"the same version on every node, set {settings.VARIABLE} alike, and let VLLM_PLUGINS, where "
        "it is set, name nway_lora on every node."
    )


def _reporter() -> Callable[[Any], tuple[str, str, tuple[str, ...]] | None]:
    # A nested function is pickled by value, so that it runs where this package is not installed.
    def report(_worker: Any) -> tuple[str, str, tuple[str, ...]] | None:
        import sys

        package = sys.modules.get("vllm_nway_lora")
        patches = sys.modules.get("vllm_nway_lora.patches")
        if package is None or patches is None:
            return None
        mode = sys.modules["vllm_nway_lora.settings"].read_mode().value
        return package.__version__, mode, tuple(patch.name for patch in patches.applied())

    return report


def _lora_manager(worker: Any) -> Any:
    """Return the ``WorkerLoRAManager`` of a worker, or None if it has none of vLLM's kind."""
    return getattr(getattr(worker, "model_runner", None), "lora_manager", None)


def _prepare(worker: Any, lora_request: Any) -> tuple[bool, str]:
    """Load and check an adapter without making room for it; return whether, and the error."""
    manager = _lora_manager(worker)
    try:
        if manager is None or (
            lora_request.lora_int_id in manager.list_adapters() and not lora_request.load_inplace
        ):
            return False, ""
        setattr(manager, PREPARED, (lora_request, manager._load_adapter(lora_request)))
    except Exception as error:
        return False, _text(error)
    return True, ""


def _commit(worker: Any, lora_request: Any) -> tuple[bool, str]:
    """Add the adapter that was prepared; return what ``add_lora`` does, and the error."""
    try:
        return bool(worker.add_lora(lora_request)), ""
    except Exception as error:
        logger.exception("Adding adapter %s failed", lora_request.lora_name)
        return False, _text(error)
    finally:
        _forget(worker)


def _forget(worker: Any) -> None:
    with contextlib.suppress(AttributeError):
        delattr(_lora_manager(worker), PREPARED)


def _withdraw(worker: Any, lora_id: int) -> None:
    # vLLM to 0.32.0 marks a slot as the adapter's before it writes it: free what a failure left.
    manager = _lora_manager(worker)
    if manager is not None:
        manager.remove_adapter(lora_id)


def _text(error: Exception) -> str:
    """Say an error in words; its class may be one that cannot be pickled."""
    return str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"


def _by_rank(errors: Sequence[str]) -> str:
    """Join the ranks' errors, each said once, with its ranks where they are not all the same."""
    ranks: dict[str, list[str]] = {}
    for rank, error in enumerate(errors):
        ranks.setdefault(error or "no error", []).append(str(rank))
    if len(ranks) == 1:
        return errors[0]
    return " ".join(
        f"On rank {', '.join(of)} of {len(errors)}: {error.rstrip('.')}."
        for error, of in ranks.items()
    )


def _load_if_needed(executor: Any, lora_request: Any) -> str:
    """Load a request's adapter where a model step might fail to; return the error or nothing."""
    lora_id = lora_request.lora_int_id
    loaded = _loaded_files(executor)
    if (
        not lora_request.load_inplace
        and lora_id in loaded
        and loaded[lora_id] == _files(lora_request.lora_path)
    ):
        return ""
    try:
        executor.add_lora(lora_request)
    except Exception as error:
        return _text(error)
    # Done for this request: a step would do it again, and again at the next.
    lora_request.load_inplace = False
    return ""


def _loaded_files(executor: Any) -> dict[int, Any]:
    if not hasattr(executor, _LOADED):
        setattr(executor, _LOADED, {})
    loaded: dict[int, Any] = getattr(executor, _LOADED)
    return loaded


def _files(path: str) -> tuple[tuple[str, int, int], ...] | None:
    """Return name, size and time of an adapter's files; None if ``path`` is no local folder."""
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


def _answer_with_error(engine: Any, request: Any) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    request_id = request.request_id
    outputs = EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)],
        finished_requests={request_id},
    )
    engine.output_queue.put_nowait((request.client_index, outputs))
