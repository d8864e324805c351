# SPDX-License-Identifier: Apache-2.0
"""Every touch on vLLM: named patches, applied in groups on import, and undone."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_nway_lora import releases, settings

logger = logging.getLogger("vllm.nway_lora")


@dataclass(frozen=True)
class Patch:
    """One attribute of vLLM that this package replaces.

    Attributes:
        name: what the patch is called in messages.
        module: the module that has the attribute.
        attribute: its path in there (``function`` or ``Class.method``).
        replacement: from what vLLM has there to what goes there instead.
        parameters: names that a function there must take, beside any others.
    """

    name: str
    module: str
    attribute: str
    replacement: Callable[[Any], Any]
    parameters: tuple[str, ...] = ()

    def find(self) -> tuple[Any, str]:
        """Return the object that holds the attribute, and the attribute's own name.

        Raises:
            Missing: the attribute is not there, or does not take the parameters.
        """
        owner: Any = sys.modules.get(self.module)
        path, _, name = self.attribute.rpartition(".")
        for step in filter(None, path.split(".")):
            owner = getattr(owner, step, None)
        found = getattr(owner, name, None)
        if found is None:
            raise Missing(f"{self.module}.{self.attribute} ({self.name})")
        if self.parameters:
            lacking = set(self.parameters) - set(inspect.signature(found).parameters)
            if lacking:
                raise Missing(
                    f"the parameter {', '.join(sorted(lacking))} of "
                    f"{self.module}.{self.attribute} ({self.name})"
                )
        return owner, name


class Missing(LookupError):
    """Something of vLLM that a patch needs is not there; the message names it."""


@dataclass(frozen=True)
class Group:
    """Patches that are applied together, or none of them.

    Attributes:
        anchor: the module whose import applies the group. It imports those of the patches, so that
            every target can be looked at before the first is replaced.
    """

    anchor: str
    patches: tuple[Patch, ...]


def _with_our_layer_first(lora_classes: Any) -> tuple[type, ...]:
    # `from_layer` takes the first class that claims a layer. vLLM to 0.19.1 keeps them in a set,
    # whose order differs between processes; none but ours claims what ours claims first.
    from vllm_nway_lora.layer import NWayLinearWithLoRA

    return (NWayLinearWithLoRA, *lora_classes)


def _with_completed_mapping(function: Any) -> Any:
    from vllm_nway_lora.mappings import process_packed_modules_mapping

    return wrapt.FunctionWrapper(function, process_packed_modules_mapping)


def _with_one_layer_per_base_layer(method: Any) -> Any:
    from vllm_nway_lora.mappings import create_lora_modules

    return wrapt.FunctionWrapper(method, create_lora_modules)


def _with_loader_remembered(init: Any) -> Any:
    def __init__(wrapped: Any, mixer: Any, args: Any, kwargs: Any) -> None:
        from vllm_nway_lora.probe import remember

        wrapped(*args, **kwargs)
        remember(mixer.in_proj)

    return wrapt.FunctionWrapper(init, __init__)


_MAMBA2 = "vllm.model_executor.layers.mamba.mamba_mixer2"

GROUPS = (
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "lora-layer-class", "vllm.lora.utils", "_all_lora_classes", _with_our_layer_first
            ),
            Patch(
                "packed-modules-mapping",
                "vllm.lora.model_manager",
                "process_packed_modules_mapping",
                _with_completed_mapping,
                parameters=("model",),
            ),
        ),
    ),
    # Needed to 0.21.0; from 0.22.0 on vLLM does the same by itself, and this finds nothing to do.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "layers-of-two-names",
                "vllm.lora.model_manager",
                "LoRAModelManager._create_lora_modules",
                _with_one_layer_per_base_layer,
            ),
        ),
    ),
    # Mamba2 sets a loader on the weight of its `in_proj`, which packing for CPU or quantisation drops.
    Group(
        _MAMBA2, (Patch("mamba2-loader", _MAMBA2, "MambaMixer2.__init__", _with_loader_remembered),)
    ),
)

#: (owner, attribute's name) -> what vLLM had there, per patch that is in place.
_originals: dict[Patch, tuple[Any, str, Any]] = {}
_active = False
_hooked = False


def register() -> None:
    """See :func:`vllm_nway_lora.register`."""
    global _active, _hooked
    settings.declare_to_vllm()
    if settings.read_mode() is settings.Mode.OFF:
        return
    _active = True
    if not _hooked:
        # wrapt has no way to take a hook back, so there is one for good and `_active` guards it.
        _hooked = True
        for group in GROUPS:
            wrapt.register_post_import_hook(_on_import, group.anchor)
    else:
        for group in GROUPS:
            if group.anchor in sys.modules:
                _apply(group)


def unregister() -> None:
    """See :func:`vllm_nway_lora.unregister`."""
    global _active
    _active = False
    for owner, name, original in _originals.values():
        setattr(owner, name, original)
    _originals.clear()


def applied() -> tuple[Patch, ...]:
    """Return the patches that are in place in this process."""
    return tuple(_originals)


def _on_import(module: ModuleType) -> None:
    if _active:
        for group in GROUPS:
            if group.anchor == module.__name__:
                _apply(group)


def _apply(group: Group) -> None:
    """Apply every patch of a group whose modules are imported, or none of them."""
    if any(patch in _originals for patch in group.patches):
        return
    version = importlib.import_module("vllm").__version__
    support = releases.support(version)
    if support is releases.Support.TOO_OLD:
        _stand_aside(f"vLLM {version} is older than {releases.FIRST}, the first that it serves")
        return
    targets, missing = {}, []
    for patch in group.patches:
        try:
            targets[patch] = patch.find()
        except Missing as error:
            missing.append(str(error))
    if missing:
        _stand_aside(f"vLLM {version} lacks {', '.join(missing)}")
        return
    originals = {p: (owner, name, getattr(owner, name)) for p, (owner, name) in targets.items()}
    replacements = {patch: patch.replacement(originals[patch][2]) for patch in originals}
    for patch, (owner, name, _) in originals.items():
        setattr(owner, name, replacements[patch])
    _originals.update(originals)
    if support is releases.Support.UNTESTED:
        logger.warning(
            "vllm-nway-lora has not been tested on vLLM %s; all that it needs is there, so it is on. "
            "%s=0 turns it off.",
            version,
            settings.VARIABLE,
        )


def _stand_aside(reason: str) -> None:
    if settings.read_mode() is settings.Mode.STRICT:
        raise RuntimeError(f"{settings.VARIABLE}=strict: vllm-nway-lora cannot be on: {reason}.")
    logger.warning("vllm-nway-lora stands aside and leaves vLLM as it is: %s.", reason)
