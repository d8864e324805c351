"""What else happens to the LoRA manager of this process's TP rank than that adapters are added."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from support import manager
from support.manager import get_rank
from support.tiny import MAX_LORAS, MAX_RANK


def break_layer(path: str) -> None:
    """Have a layer of this process's TP rank fail when an adapter is written into it."""

    def fail(*_: Any) -> None:
        raise MemoryError(path)

    get_rank().manager.modules[path].set_lora = fail


def interrupt(path: str, folder: Path) -> bool:
    """Interrupt the activation of adapter 1 on this process's TP rank; return whether it is there."""
    rank = get_rank()
    with mock.patch.object(rank.manager.modules[path], "set_lora", side_effect=KeyboardInterrupt):
        try:
            rank.add("a", 1, folder)
        except KeyboardInterrupt:
            return manager.has(1)
    raise AssertionError("not interrupted")


def repair_layer(path: str) -> None:
    """Undo :func:`break_layer`."""
    del get_rank().manager.modules[path].set_lora


def pin_all(folder: Path) -> None:
    """Fill all slots of this process's TP rank with an adapter and pin them."""
    for number in range(1, MAX_LORAS + 1):
        assert get_rank().add(str(number), number, folder) == ""
        assert get_rank().worker_manager.pin_adapter(number)


def clone(number: int, to: int) -> None:
    """Add a copy of an adapter of this process's TP rank under another number."""
    get_rank().manager.add_adapter(get_rank().manager.get_adapter(number).clone(to))
    get_rank().manager.activate_adapter(to)


class _Foreign:
    """A platform's own manager, with all that vLLM's has."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


@contextmanager
def _foreign_manager() -> Iterator[None]:
    rank = get_rank()
    with mock.patch.object(rank.worker_manager, "_adapter_manager", _Foreign(rank.manager)):
        yield


def is_ours(foreign: bool = False) -> bool:
    """Return `owns_manager`'s answer for this process's TP rank, or with a foreign manager below it."""
    from vllm_nway_lora.adapters.hooks import owns_manager

    with _foreign_manager() if foreign else nullcontext():
        return owns_manager(get_rank().worker_manager)


def load_with_foreign_manager(folder: Path) -> str:
    """Load an adapter with a foreign manager; return the class of the result."""
    request = get_rank().request("a", 9, folder)
    with _foreign_manager():
        return type(get_rank().worker_manager._load_adapter(request)).__name__


def prepare(parent: Path, name: str, number: int, path: str) -> None:
    """Prepare an adapter as the engine does."""
    from vllm_nway_lora.adapters.prepared import prepared, source_of

    request = get_rank().request(name, number, parent / path)
    worker_manager = get_rank().worker_manager
    prepared(worker_manager)[source_of(request)] = worker_manager._load_adapter(request)


def move_to_another_manager(folder: Path) -> list[str]:
    """Load an adapter with one LoRA manager and add it to another; return what the plugin logs."""
    adapter = get_rank().worker_manager._load_adapter(get_rank().request("a", 1, folder))
    manager.start()
    manager.said(logging.INFO)
    get_rank().manager._add_adapter(adapter)
    return manager.said(logging.INFO)


def count_work(name: str, number: int, folder: Path) -> tuple[int, int]:
    """Prepare an adapter as the engine does, then add it; return how often it was loaded and examined."""
    from vllm.lora.lora_model import LoRAModel

    from vllm_nway_lora.adapters import admission

    with (
        mock.patch.object(admission, "examine", wraps=admission.examine) as examine,
        mock.patch.object(
            LoRAModel, "__init__", autospec=True, side_effect=LoRAModel.__init__
        ) as load,
    ):
        prepare(folder.parent, name, number, folder.name)
        get_rank().worker_manager.add_adapter(get_rank().request(name, number, folder))
    return load.call_count, examine.call_count


def warm_up() -> list[int]:
    """Add vLLM's dummy adapters as it does before it captures graphs; return those that are active."""
    from vllm.lora.request import LoRARequest

    rank = get_rank()
    with rank.worker_manager.dummy_lora_cache():
        for number in range(1, MAX_LORAS + 1):
            request = LoRARequest(f"warmup_{number}", number, "/not/a/path")
            rank.worker_manager.add_dummy_lora(request, MAX_RANK)
            rank.manager.activate_adapter(number)
    active = [number for number in rank.manager.lora_index_to_id if number is not None]
    rank.worker_manager.remove_all_adapters()
    return active
