# SPDX-License-Identifier: Apache-2.0
"""Turn the plugin on and off in this process: apply every group as its anchor is imported."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import wrapt

from vllm_nway_lora import settings
from vllm_nway_lora.compat import groups, releases
from vllm_nway_lora.compat.patching import Group, MissingAttributeError, Patch, Patcher

logger = logging.getLogger("vllm.nway_lora")

_patcher = Patcher()
_is_active = False
_has_hooks = False
# Messages that this process has logged: several groups can have the same one.
_logged: set[str] = set()


def register() -> None:
    """See :func:`vllm_nway_lora.register`."""
    global _is_active, _has_hooks
    settings.declare_to_vllm()
    if settings.read_mode() is settings.Mode.OFF:
        return
    _is_active = True
    if not _has_hooks:
        # wrapt cannot remove a hook, so the hooks stay and `_is_active` guards them.
        _has_hooks = True
        for anchor in dict.fromkeys(group.anchor for group in groups.GROUPS):
            wrapt.register_post_import_hook(_on_import, anchor)
    else:
        for group in groups.GROUPS:
            if _is_active and group.anchor in sys.modules:
                _apply(group)


def unregister() -> None:
    """See :func:`vllm_nway_lora.unregister`."""
    _undo()
    _logged.clear()


def applied() -> tuple[Patch, ...]:
    """Return the patches that are in place in this process."""
    return _patcher.applied


def _undo() -> None:
    global _is_active
    _is_active = False
    _patcher.undo()


def _on_import(module: ModuleType) -> None:
    for group in groups.GROUPS:
        if _is_active and group.anchor == module.__name__:
            _apply(group)


def _apply(group: Group) -> None:
    """Apply a group if this release needs it and has all that it uses; else stand aside."""
    version = importlib.import_module("vllm").__version__
    support = releases.support(version)
    if support is releases.Support.TOO_OLD:
        _stand_aside(f"vLLM {version} is older than {releases.FIRST}, the oldest supported release")
        return
    if not groups.is_needed(group, version):
        names = ", ".join(patch.name for patch in group.patches)
        _log_once(
            logging.INFO,
            f"vllm-nway-lora does not apply {names}: vLLM {version} does not need it.",
        )
        return
    try:
        _patcher.apply(group)
    except MissingAttributeError as error:
        _stand_aside(f"vLLM {version} lacks {error}")
        return
    # Only where LoRA layers are built, so that each worker logs it and no other process does.
    if support is releases.Support.UNTESTED and group is groups.GROUPS[0]:
        _log_once(
            logging.WARNING,
            f"vllm-nway-lora has not been tested on vLLM {version}. All that it needs exists, so "
            f"it is on. {settings.VARIABLE}=0 turns it off.",
        )


def _stand_aside(reason: str) -> None:
    """Undo every patch, so that this process has all of this package's patches or none."""
    _undo()
    if settings.read_mode() is settings.Mode.STRICT:
        raise RuntimeError(f"{settings.VARIABLE}=strict: vllm-nway-lora cannot be on: {reason}.")
    _log_once(logging.WARNING, f"vllm-nway-lora stands aside and leaves vLLM unchanged: {reason}.")


def _log_once(level: int, text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        logger.log(level, "%s", text)
