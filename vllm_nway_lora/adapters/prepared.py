# SPDX-License-Identifier: Apache-2.0
"""The adapter that a worker has loaded and validated, before it takes a slot.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "_nway_lora_prepared"


@dataclass(frozen=True)
class Prepared:
    """A prepared adapter, stored on one attribute of a worker's LoRA manager.

    Attributes:
        request: the ``LoRARequest`` that it was loaded for.
        adapter: the ``LoRAModel``.
    """

    request: Any
    adapter: Any


def get_prepared(worker_manager: Any, request: Any) -> Any:
    """Return the adapter that was prepared for ``request``, or None."""
    prepared: Prepared | None = getattr(worker_manager, _ATTRIBUTE, None)
    if prepared is None or not _is_same(prepared.request, request):
        return None
    return prepared.adapter


def set_prepared(worker_manager: Any, request: Any, adapter: Any) -> None:
    """Store a prepared adapter in place of any earlier one."""
    setattr(worker_manager, _ATTRIBUTE, Prepared(request, adapter))


def forget_prepared(worker_manager: Any) -> None:
    """Remove the prepared adapter, if there is one."""
    if hasattr(worker_manager, _ATTRIBUTE):
        delattr(worker_manager, _ATTRIBUTE)


def _is_same(one: Any, other: Any) -> bool:
    # `LoRARequest.__eq__` compares names only.
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("lora_int_id", "lora_name", "lora_path")
    )
