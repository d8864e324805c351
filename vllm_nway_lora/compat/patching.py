# SPDX-License-Identifier: Apache-2.0
"""Replace attributes of imported modules in groups, all or none, and restore them.

Generic: this module imports nothing of vLLM and knows no target.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class MissingAttributeError(LookupError):
    """An attribute that a group needs does not exist; the message names it."""


@dataclass(frozen=True)
class Need:
    """An attribute of an imported module that must exist.

    Attributes:
        module: the module's full name.
        attribute: the path within the module, ``function`` or ``Class.method``.
        parameters: names of parameters that the function must accept.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"

    def find(self) -> tuple[Any, str]:
        """Return the object that owns the attribute, and the attribute's own name.

        Raises:
            MissingAttributeError: the attribute does not exist, or lacks a parameter.
        """
        owner: Any = sys.modules.get(self.module)
        path, _, name = self.attribute.rpartition(".")
        for step in filter(None, path.split(".")):
            owner = getattr(owner, step, None)
        found = getattr(owner, name, None)
        if found is None:
            raise MissingAttributeError(str(self))
        if self.parameters:
            lacking = set(self.parameters) - set(inspect.signature(found).parameters)
            if lacking:
                raise MissingAttributeError(f"the parameter {', '.join(sorted(lacking))} of {self}")
        return owner, name


@dataclass(frozen=True)
class Patch:
    """One attribute to replace.

    Attributes:
        name: the patch's name in messages.
        target: the attribute.
        replacement: a function from the original attribute to its replacement.
    """

    name: str
    target: Need
    replacement: Callable[[Any], Any]

    def find(self) -> tuple[Any, str]:
        """As :meth:`Need.find`; the error also names the patch."""
        try:
            return self.target.find()
        except MissingAttributeError as error:
            raise MissingAttributeError(f"{error} ({self.name})") from None


@dataclass(frozen=True)
class Group:
    """Patches that are applied together or not at all.

    Attributes:
        anchor: the module whose import applies the group. It imports the modules of all patches,
            so that every target can be checked before the first one is replaced.
        patches: the attributes to replace.
        defects: names of the defects that the group fixes (:mod:`vllm_nway_lora.compat.defects`).
        needs: other attributes that the replacements use.
    """

    anchor: str
    patches: tuple[Patch, ...]
    defects: tuple[str, ...]
    needs: tuple[Need, ...] = ()


class Patcher:
    """Applies groups in this process and restores the originals."""

    def __init__(self) -> None:
        # Patch -> (owner, attribute's name, original attribute).
        self._originals: dict[Patch, tuple[Any, str, Any]] = {}

    @property
    def applied(self) -> tuple[Patch, ...]:
        """The patches that are in place, in the order in which they were applied."""
        return tuple(self._originals)

    def apply(self, group: Group) -> None:
        """Apply every patch of a group, unless the group is in place already.

        Raises:
            MissingAttributeError: something that the group needs does not exist. The message names
                all that is missing. Nothing has been replaced then.
        """
        if any(patch in self._originals for patch in group.patches):
            return
        originals: dict[Patch, tuple[Any, str, Any]] = {}
        missing = []
        parts: tuple[Need | Patch, ...] = (*group.needs, *group.patches)
        for part in parts:
            try:
                owner, name = part.find()
            except MissingAttributeError as error:
                missing.append(str(error))
                continue
            if isinstance(part, Patch):
                # Not `getattr`, which binds class methods.
                originals[part] = (owner, name, inspect.getattr_static(owner, name))
        if missing:
            raise MissingAttributeError(", ".join(missing))
        try:
            replacements = {
                patch: patch.replacement(original) for patch, (_, _, original) in originals.items()
            }
        except (ImportError, AttributeError) as error:  # from the modules of the replacements
            raise MissingAttributeError(f"what this package imports: {error}") from error
        for patch, (owner, name, _) in originals.items():
            setattr(owner, name, replacements[patch])
        self._originals.update(originals)

    def undo(self) -> None:
        """Restore every original attribute."""
        for owner, name, original in self._originals.values():
            setattr(owner, name, original)
        self._originals.clear()
