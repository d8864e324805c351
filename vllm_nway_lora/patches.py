# SPDX-License-Identifier: Apache-2.0
"""Every touch on vLLM: named patches, applied when their module is imported, and undone."""

from __future__ import annotations

import importlib
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
    """One attribute of one vLLM module that this package replaces.

    Attributes:
        name: what the patch is called in messages.
        module: the module whose import applies it.
        attribute: the attribute of that module.
        replacement: from what vLLM has there to what goes there instead.
    """

    name: str
    module: str
    attribute: str
    replacement: Callable[[Any], Any]


def _with_our_layer_first(lora_classes: Any) -> tuple[type, ...]:
    # `from_layer` takes the first class that claims a layer. vLLM to 0.19.1 keeps them in a set,
    # whose order differs between processes; none but ours claims what ours claims first.
    from vllm_nway_lora.layer import NWayLinearWithLoRA

    return (NWayLinearWithLoRA, *lora_classes)


PATCHES = (
    Patch("lora-layer-class", "vllm.lora.utils", "_all_lora_classes", _with_our_layer_first),
)

_originals: dict[Patch, Any] = {}
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
        for module in {patch.module for patch in PATCHES}:
            wrapt.register_post_import_hook(_apply_to, module)
    else:
        for module in {patch.module for patch in PATCHES} & sys.modules.keys():
            _apply_to(sys.modules[module])


def unregister() -> None:
    """See :func:`vllm_nway_lora.unregister`."""
    global _active
    _active = False
    for patch, original in _originals.items():
        setattr(sys.modules[patch.module], patch.attribute, original)
    _originals.clear()


def applied() -> tuple[Patch, ...]:
    """Return the patches that are in place in this process."""
    return tuple(_originals)


def _apply_to(module: ModuleType) -> None:
    """Apply all patches of a module that was just imported, or none of them."""
    if not _active:
        return
    wanted = [patch for patch in PATCHES if patch.module == module.__name__]
    wanted = [patch for patch in wanted if patch not in _originals]
    version = importlib.import_module("vllm").__version__
    missing = [patch for patch in wanted if not hasattr(module, patch.attribute)]
    support = releases.support(version)
    if support is releases.Support.TOO_OLD:
        _stand_aside(f"vLLM {version} is older than {releases.FIRST}, the first that it serves")
        return
    if missing:
        names = ", ".join(f"{patch.module}.{patch.attribute} ({patch.name})" for patch in missing)
        _stand_aside(f"vLLM {version} lacks {names}")
        return
    originals = {patch: getattr(module, patch.attribute) for patch in wanted}
    replacements = {patch: patch.replacement(old) for patch, old in originals.items()}
    for patch, new in replacements.items():
        setattr(module, patch.attribute, new)
    _originals.update(originals)
    if wanted and support is releases.Support.UNTESTED:
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
