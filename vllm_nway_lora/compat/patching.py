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
    """An attribute of a module that must exist.

    Attributes:
        module: the module's full name.
        attribute: the path within the module, ``function`` or ``Class.attribute``.
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
            MissingAttributeError: the module is not imported, or the attribute does not exist or
                lacks a parameter.
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
        switch: the environment variable that turns the group off; empty if it has none of its own.
    """

    anchor: str
    patches: tuple[Patch, ...]
    defects: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    switch: str = ""


@dataclass(frozen=True)
class Placed:
    """A replacement that this package has put in the place of an attribute.

    Attributes:
        owner: the module or class that has the attribute.
        name: the attribute's own name.
        original: the attribute before.
        replacement: the attribute after.
        is_inherited: whether a base class had the attribute, and the owner itself did not.
        subclasses: the subclasses of the owner. A class whose name another package has taken would be
            forgotten otherwise.
    """

    owner: Any
    name: str
    original: Any
    replacement: Any
    is_inherited: bool
    subclasses: tuple[type, ...] = ()

    @property
    def current(self) -> Any:
        """The attribute as it is now."""
        return inspect.getattr_static(self.owner, self.name, None)

    @property
    def is_in_place(self) -> bool:
        """Whether the attribute is the replacement, or a wrapper around it that names what it wraps."""
        found = self.current
        while found is not None and found is not self.replacement:
            found = getattr(found, "__wrapped__", None)
        return found is not None


class Patcher:
    """Applies groups in this process and restores the originals."""

    def __init__(self) -> None:
        self.placed: dict[Patch, Placed] = {}

    @property
    def applied(self) -> tuple[Patch, ...]:
        """The patches that are in place now, in the order in which they were applied.

        A patch whose target somebody else has replaced since is not one of them.
        """
        return tuple(patch for patch, placed in self.placed.items() if placed.is_in_place)

    def apply(self, group: Group) -> None:
        """Apply every patch of a group, unless the group has been applied already.

        Raises:
            MissingAttributeError: something that the group needs does not exist. The message names
                all that is missing. Nothing has been replaced then.
        """
        if any(patch in self.placed for patch in group.patches):
            return
        targets: dict[Patch, tuple[Any, str]] = {}
        missing = []
        parts: tuple[Need | Patch, ...] = (*group.needs, *group.patches)
        for part in parts:
            try:
                target = part.find()
            except MissingAttributeError as error:
                missing.append(str(error))
                continue
            if isinstance(part, Patch):
                targets[part] = target
        if missing:
            raise MissingAttributeError(", ".join(missing))
        try:
            placed = {patch: _replace(patch, *target) for patch, target in targets.items()}
        except (ImportError, AttributeError) as error:  # from the modules of the replacements
            raise MissingAttributeError(f"what this package imports: {error}") from error
        for each in placed.values():
            setattr(each.owner, each.name, each.replacement)
        self.placed.update(placed)

    def undo(self) -> None:
        """Restore every original attribute, except those that somebody else has replaced since."""
        for placed in self.placed.values():
            if placed.current is not placed.replacement:
                continue
            if placed.is_inherited:
                delattr(placed.owner, placed.name)
            else:
                setattr(placed.owner, placed.name, placed.original)
        self.placed.clear()


def _replace(patch: Patch, owner: Any, name: str) -> Placed:
    # Not `getattr`, which binds class methods.
    original = inspect.getattr_static(owner, name)
    return Placed(
        owner,
        name,
        original,
        patch.replacement(original),
        name not in vars(owner),
        tuple(owner.__subclasses__()) if inspect.isclass(owner) else (),
    )
