# SPDX-License-Identifier: Apache-2.0
"""Adapters that a worker has loaded and validated, and that do not have a slot yet.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

_STORE = "_nway_lora_prepared"
_SOURCE = "_nway_lora_source"


class Source(NamedTuple):
    """The identity of an adapter in requests."""

    id: int
    name: str
    path: str


def source_of(request: Any) -> Source:
    """Return the identity that a ``LoRARequest`` names (its ``__eq__`` compares names only)."""
    return Source(request.lora_int_id, request.lora_name, request.lora_path)


def prepared(worker_manager: Any) -> dict[Source, Any]:
    """Return a worker's prepared adapters, stored on one attribute of its LoRA manager."""
    store: dict[Source, Any] = vars(worker_manager).setdefault(_STORE, {})
    return store


def take_prepared(worker_manager: Any, request: Any) -> Any:
    """Remove and return the adapter that was prepared for ``request``, or None."""
    return prepared(worker_manager).pop(source_of(request), None)


def keep_prepared(worker_manager: Any, wanted: Collection[Source]) -> None:
    """Remove the prepared adapters that are not in ``wanted``."""
    store = prepared(worker_manager)
    for source in store.keys() - set(wanted):
        del store[source]


def get_source(adapter: Any) -> Source | None:
    """Return the source that was set on a ``LoRAModel``; None if it came by another way."""
    source: Source | None = getattr(adapter, _SOURCE, None)
    return source


def set_source(adapter: Any, source: Source) -> None:
    """Set the source of a ``LoRAModel``."""
    setattr(adapter, _SOURCE, source)
