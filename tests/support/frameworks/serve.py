"""Run a stand-in beside the plugin in this process, and measure what becomes of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import vllm_nway_lora
from support import manager, tiny
from support.frameworks import areal, platforms, tensors, unsloth, workarounds
from support.frameworks.framework import Framework
from support.tiny import PREFIX, SHAPES
from vllm_nway_lora.compat import groups, registration
from vllm_nway_lora.compat.patching import MissingAttributeError

#: Stand-in's name -> its class.
FRAMEWORKS: dict[str, type[Framework]] = {
    framework.name: framework
    for framework in (
        *(tensors.Verl, tensors.Swift, tensors.Roll, areal.Areal, unsloth.Unsloth),
        *(workarounds.Art, workarounds.PrimeRl, platforms.Ascend018, platforms.Ascend026),
        *(platforms.Ascend026OneSlot, platforms.Gaudi, platforms.Tpu),
    )
}
#: The plugin before the framework, the reverse, and vLLM with the framework alone.
ORDERS = ("plugin first", "framework first")
STOCK = "stock"

LAYER = "model.layers.0."
ALL = "all"
#: The modules of one layer, and what is outside the layers; each of them is an adapter of its own.
ALONE = tuple(module for module in SHAPES if "layers.1." not in module)


def cut(module: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that shortens LoRA-B of one module."""
    name = next(n for n in tiny.tensors(0, [module]) if "lora_B" in n or "embedding_B" in n)
    return lambda values: values | {name: values[name][:-4].contiguous()}


def _rename(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("in_proj_z", "in_proj_zx"): value for name, value in values.items()}


def _drop(values: dict[str, Any]) -> dict[str, Any]:
    name = f"{PREFIX}{LAYER}linear_attn.in_proj_z.lora_B.weight"
    return {n: value for n, value in values.items() if n != name}


#: Fault -> function from good tensors to damaged ones.
DAMAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "in_proj_z misnamed": _rename,
    "in_proj_z without B": _drop,
    **{f"{module} cut": cut(module) for module in ALONE if module.startswith(LAYER)},
}


@dataclass(frozen=True)
class Outcome:
    """What became of an adapter.

    Attributes:
        error: the error's text if it was refused.
        exact: whether its slots equal its files.
        gone: whether it was refused and nothing of it is left, but perhaps in a slot without an owner.
        unwritten: whether every slot is as it was before.
    """

    error: str
    exact: bool
    gone: bool
    unwritten: bool


@dataclass
class Served:
    """What a stand-in did.

    Attributes:
        failed: the error with which the LoRA manager did not start.
        is_resident: whether the adapter that was added first is exact at the end.
        good: adapter -> outcome.
        damaged: fault -> outcome.
        is_own: whether the framework's own package was run, not the stand-in.
        left: attributes that :func:`vllm_nway_lora.unregister` has not restored.
        classes: the LoRA layers' classes.
    """

    failed: str = ""
    is_resident: bool = True
    good: dict[str, Outcome] = field(default_factory=dict)
    damaged: dict[str, Outcome] = field(default_factory=dict)
    is_own: bool = False
    left: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)


def serve(name: str, order: str, folder: Path) -> Served:
    """Start a LoRA manager with a stand-in, add good and damaged adapters, and turn the plugin off.

    Args:
        name: of :data:`FRAMEWORKS`.
        order: of :data:`ORDERS`, or :data:`STOCK`.
        folder: an empty folder for the adapters.
    """
    served = Served()
    framework = FRAMEWORKS[name]()
    try:
        rank, before = _start(framework, order)
    except Exception as error:
        served.failed = f"{type(error).__name__}: {error}"
        return served
    served.is_own = framework.module is not None
    served.classes = {type(layer).__name__ for layer in rank.manager.modules.values()}
    whole = tuple(module for module in SHAPES if not module.endswith(framework.unserved))
    good = {ALL: whole, **{module: (module,) for module in ALONE}}
    resident = tiny.save(folder / "resident", tiny.tensors(0, whole))
    # Stock vLLM refuses a whole adapter beside some stand-ins.
    has_room = framework.max_loras > 1 and order != STOCK
    if has_room:
        _add(framework, rank, 1, resident)
    attempt = _Attempts(framework, rank, folder)
    for number, (adapter, modules) in enumerate(good.items(), start=1):
        served.good[adapter] = attempt(tiny.tensors(number, modules))
    if order != STOCK:
        for fault, damage in DAMAGES.items():
            if fault.removesuffix(" cut").endswith(framework.unserved):
                continue
            served.damaged[fault] = attempt(damage(tiny.tensors(1, whole)))
    served.is_resident = not has_room or rank.is_exact(1, resident)
    # What the framework has replaced since stays.
    replaced = [
        (placed.owner, placed.name)
        for placed in registration.placed().values()
        if placed.current is not placed.replacement
    ]
    vllm_nway_lora.unregister()
    served.left = [
        f"{owner}.{attribute}"
        for owner, attribute, found in before
        if inspect.getattr_static(owner, attribute) is not found
        and (owner, attribute) not in replaced
    ]
    return served


def _start(framework: Framework, order: str) -> tuple[manager.Rank, list[tuple[Any, str, Any]]]:
    """Build the LoRA manager; return it, and the plugin's targets as they were before it was on."""
    register = vllm_nway_lora.register
    before: list[tuple[Any, str, Any]] = []

    def register_too() -> None:
        if order != "plugin first":
            framework.patch()
        before.extend(_find_targets())
        register()
        if order == "plugin first":
            framework.patch()

    with (
        mock.patch.object(vllm_nway_lora, "register", register_too),
        mock.patch.object(manager, "MAX_LORAS", framework.max_loras),
    ):
        mode = "0" if order == STOCK else "1"
        rank = manager.Rank(mode=mode, packed=framework.packed, max_cpu_loras=framework.max_loras)
    return rank, before


def _find_targets() -> list[tuple[Any, str, Any]]:
    """Return the owner, the name and the value of each attribute that the plugin replaces here."""
    found = []
    for group in groups.GROUPS:
        for patch in group.patches:
            try:
                owner, name = patch.find()
            except MissingAttributeError:  # of a module that this process has not imported
                continue
            found.append((owner, name, inspect.getattr_static(owner, name)))
    return found


def _add(framework: Framework, rank: manager.Rank, number: int, folder: Path) -> None:
    framework.begin(rank.worker_manager, number, folder)
    framework.add(rank.worker_manager, number, folder)


def _try(function: Callable[[], None]) -> str:
    """Call a function; return its error."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class _Attempts:
    """Adds adapters one by one, and removes each again."""

    framework: Framework
    rank: manager.Rank
    folder: Path

    def __call__(self, values: dict[str, torch.Tensor]) -> Outcome:
        rank, number = self.rank, 2
        older = tiny.save(self.folder / "older", tiny.tensors(99, [f"{LAYER}self_attn.o_proj"]))
        self.framework.begin(rank.worker_manager, number, older)
        before = rank.buffers()
        added = tiny.save(self.folder / "added", values)
        error = _try(lambda: self.framework.add(rank.worker_manager, number, added))
        exact = not error and rank.is_exact(number, added)
        gone = bool(error) and self._keeps_nothing_new(number, older)
        unwritten = all(map(torch.equal, before, rank.buffers()))
        rank.worker_manager.remove_adapter(number)
        return Outcome(error, exact, gone, unwritten)

    def _keeps_nothing_new(self, number: int, older: Path) -> bool:
        """Return whether a refused adapter is gone, or its older version is still there."""
        if number not in self.rank.manager.lora_index_to_id:
            return number not in self.rank.manager.list_adapters()
        return bool(self.rank.is_exact(number, older))
