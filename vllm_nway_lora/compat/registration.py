# SPDX-License-Identifier: Apache-2.0
"""Turn the plugin on and off in this process: apply every group as its anchor is imported.

On an untested release, each process first looks for everything that the package uses, in vLLM's sources
(:mod:`vllm_nway_lora.compat.sources`). All processes of an engine find the same, so that all of them
have the patches or none has.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Mapping
from types import ModuleType

import wrapt

from vllm_nway_lora import settings
from vllm_nway_lora.compat import groups, needs, releases
from vllm_nway_lora.compat.patching import Group, MissingAttributeError, Patch, Patcher, Placed

logger = logging.getLogger("vllm.nway_lora")

_patcher = Patcher()
_is_active = False
_has_hooks = False
_reason_to_stand_aside = ""
# Messages that this process has logged: several groups can have the same one.
_logged: set[str] = set()


def register() -> None:
    """See :func:`vllm_nway_lora.register`."""
    global _is_active, _has_hooks
    settings.declare_to_vllm()
    if settings.read_mode() is settings.Mode.OFF:
        return
    for group in groups.GROUPS:
        groups.is_switched_on(group)  # raises here, not in an import, if a value is invalid
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
    global _reason_to_stand_aside
    _undo()
    _logged.clear()
    _reason_to_stand_aside = ""


def applied() -> tuple[Patch, ...]:
    """Return the patches that are in place in this process now (see :class:`Patcher`)."""
    return _patcher.applied


def placed() -> Mapping[Patch, Placed]:
    """Return what this package has put in place in this process, replaced since or not."""
    return _patcher.placed


def reason_to_stand_aside() -> str:
    """Return why this process has none of the patches; empty if it does not stand aside."""
    return _reason_to_stand_aside


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
    if not groups.is_switched_on(group):
        return
    version = importlib.import_module("vllm").__version__
    support = releases.support(version)
    if support is releases.Support.TOO_OLD:
        _stand_aside(f"vLLM {version} is older than {releases.FIRST}, the oldest supported release")
        return
    if support is releases.Support.UNTESTED and (missing := find_missing(version)):
        _stand_aside(f"vLLM {version} lacks {', '.join(missing)}")
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


@functools.cache
def find_missing(version: str) -> tuple[str, ...]:
    """Return what ``version`` of vLLM lacks of all that the package uses, as its sources show."""
    from vllm_nway_lora.compat.sources import Sources

    targets = [
        need
        for group in groups.GROUPS
        if groups.is_switched_on(group) and groups.is_needed(group, version)
        for need in (*group.needs, *(patch.target for patch in group.patches))
    ]
    release = releases.parse(version)
    is_newer = release is None or release > releases.LAST
    try:
        sources = Sources()
        used, optional = [*targets, *needs.NEEDS], needs.OF_OPTIONAL_OWNERS
        if is_newer:
            used += needs.RECENT
            optional += needs.RECENT_OF_OPTIONAL_OWNERS
        used += [need for need in optional if sources.has_owner(need)]
        faults = [sources.find_fault(need) for need in used]
    except Exception as error:
        return (f"sources that can be read ({type(error).__name__}: {error})",)
    return tuple(dict.fromkeys(filter(None, faults)))


def _stand_aside(reason: str) -> None:
    """Undo every patch, so that this process has all of this package's patches or none."""
    global _reason_to_stand_aside
    _undo()
    _reason_to_stand_aside = reason
    if settings.read_mode() is settings.Mode.STRICT:
        raise RuntimeError(f"{settings.VARIABLE}=strict: vllm-nway-lora cannot be on: {reason}.")
    _log_once(logging.WARNING, f"vllm-nway-lora stands aside and leaves vLLM unchanged: {reason}.")


def _log_once(level: int, text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        logger.log(level, "%s", text)
