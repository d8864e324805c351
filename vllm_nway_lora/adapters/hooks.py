# SPDX-License-Identifier: Apache-2.0
"""The ways into vLLM's LoRA manager, each of which leads through admission.

A worker loads an adapter with ``_load_adapter``, makes room, and adds it to its ``LoRAModelManager``.
Frameworks replace the first method on a class (verl, ms-swift, ROLL) or call the last one themselves
(AReaL). An adapter is admitted where it is loaded if that can be seen, so that a refusal has no side
effect, and otherwise before it is registered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from vllm.lora.model_manager import LoRAModelManager

from vllm_nway_lora.adapters.admission import admit, format_refusal
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.files import admission_follows
from vllm_nway_lora.adapters.prepared import take_prepared


def guard_loading(wrapped: Any, worker_manager: Any, args: Any, kwargs: Any) -> None:
    """Have an instance load through :func:`load_adapter`; wraps ``WorkerLoRAManager.__init__``."""
    wrapped(*args, **kwargs)
    worker_manager._load_adapter = functools.partial(load_adapter, worker_manager)


def load_adapter(worker_manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter and admit it whole, or refuse it; ``_load_adapter`` of guarded instances.

    In 0.17.0 to 0.33.0 ``add_adapter`` loads before it evicts, packs or writes anything.

    Raises:
        AdapterError: the adapter cannot be loaded, or it is refused.
    """
    # Found on the class now: frameworks replace it before and after the instance is built.
    load = functools.partial(type(worker_manager)._load_adapter, worker_manager)
    if not owns_manager(worker_manager):
        return load(*args, **kwargs)
    request = args[0] if args else kwargs["lora_request"]
    adapter = take_prepared(worker_manager, request)
    if adapter is not None:
        return adapter
    label = format_label(request.lora_name, request.lora_path)
    try:
        with any_layout(worker_manager._adapter_manager):
            adapter = load(*args, **kwargs)
    except Exception as error:
        raise AdapterError(format_failure(label, error)) from error
    admit(worker_manager._adapter_manager, adapter, label)
    return adapter


def format_label(name: str, path: str) -> str:
    """Return an adapter's name in messages."""
    return f"LoRA adapter {name!r} ({path})"


def format_failure(label: str, error: Exception) -> str:
    """Return the message of an adapter that cannot be loaded."""
    # vLLM's own texts stay whole: its server recognises "not found" by them.
    text = str(error) if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
    return format_refusal(label, [text])


@contextlib.contextmanager
def any_layout(manager: Any) -> Iterator[None]:
    """Within this context a worker loads an adapter in any layout; its caller admits the adapter.

    Args:
        manager: the worker's ``LoRAModelManager``. From 0.32.0 on, it refuses stacked experts for a
            layer that takes experts apart, which admission translates.
    """
    check = "_validate_moe_lora_format"
    setattr(manager, check, lambda adapter: None)
    try:
        with admission_follows():
            yield
    finally:
        delattr(manager, check)


def owns_manager(worker_manager: Any) -> bool:
    """Return whether a worker's LoRA manager is of vLLM's kind and loads through :func:`load_adapter`.

    Other platforms have managers of their own (vllm-rbln, vllm-metal, tpu-inference).
    """
    load = getattr(worker_manager, "_load_adapter", None)
    is_guarded = getattr(load, "func", None) is load_adapter
    return is_guarded and isinstance(
        getattr(worker_manager, "_adapter_manager", None), LoRAModelManager
    )


def add_adapter(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
    """Admit an adapter that was not loaded by a worker; wraps ``LoRAModelManager._add_adapter``.

    Raises:
        AdapterError: the adapter is refused. It is not registered then.
    """
    adapter = args[0] if args else kwargs["lora"]
    if not (_is_packed(adapter) or _is_zero(adapter)):
        admit(manager, adapter, f"LoRA adapter with id {adapter.id} (from memory)")
    return wrapped(*args, **kwargs)


def activate_adapter(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
    """Remove an adapter whose activation fails; wraps ``LoRAModelManager.activate_adapter``.

    Until 0.32.0 vLLM assigns the slot before it writes the slot. In every release the adapter stays
    registered, and the next request finds it and gets the slot's half-written content.
    """
    lora_id = args[0] if args else kwargs["lora_id"]
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        # If every slot has another adapter, none was written, and the adapter stays registered.
        if {None, lora_id} & {*manager.lora_index_to_id}:
            manager.remove_adapter(lora_id)
        raise


def apply_adapters(wrapped: Any, worker_manager: Any, args: Any, kwargs: Any) -> Any:
    """Use a step's resident adapters first; wraps ``LRUCacheWorkerLoRAManager._apply_adapters``.

    vLLM (0.17.0 to 0.33.0) walks a set: an adapter that it adds can evict one that comes later, which
    it then reads from disk again. If its files are gone, the engine ends.
    """
    requests = args[0] if args else kwargs["lora_requests"]
    if len(requests) > 1:
        resident = worker_manager.list_adapters()
        requests = sorted(filter(None, requests), key=lambda r: r.lora_int_id not in resident)
    return wrapped(requests)


def _is_packed(adapter: Any) -> bool:
    """Return whether an adapter has been added before; dummies of fused layers are packed too."""
    return any(isinstance(weights.lora_a, list) for weights in adapter.loras.values())


def _is_zero(adapter: Any) -> bool:
    """Return whether an adapter is zero, as the dummies of vLLM's warm-up are.

    A dummy has one TP rank's shapes (``create_dummy_lora``, vllm/lora/model_manager.py).
    """
    halves = [half for w in adapter.loras.values() for half in (w.lora_a, w.lora_b)]
    return bool(halves) and not any(half is not None and half.any() for half in halves)
