# SPDX-License-Identifier: Apache-2.0
"""Look up attributes in vLLM's sources, without importing a module.

An imported class does not show the attributes that it sets on its instances, and a process cannot
import every module (those of the API server need fastapi). The sources are the same in all processes
of an engine, so all of them find the same. Reading costs time: only untested releases are read.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from typing import NamedTuple

from vllm_nway_lora.compat.patching import Need


class _Import(NamedTuple):
    module: str
    name: str


class _Module(NamedTuple):
    """A module's own names, and the modules of its ``from ... import *``."""

    names: dict[str, ast.AST | _Import]
    stars: list[str]


class Sources:
    """The modules that have been read, each of them once."""

    def __init__(self) -> None:
        self._modules: dict[str, _Module] = {}
        self._members: dict[tuple[str, str], dict[str, ast.AST]] = {}

    def find_fault(self, need: Need) -> str:
        """Return what the sources lack of ``need``, as a phrase for a message; empty if nothing."""
        owner, _, name = need.attribute.rpartition(".")
        found: ast.AST | _Import | None
        if owner:
            found = self.find_members(need.module, owner).get(name)
        else:
            found = self._find(need.module, name)[1]
        if found is None:
            return str(need)
        lacking = set(need.parameters) - _parameters(found)
        return f"the parameter {', '.join(sorted(lacking))} of {need}" if lacking else ""

    def find_members(self, module: str, name: str) -> Mapping[str, ast.AST]:
        """Return the attributes of a class and of its instances; empty if there is no such class."""
        if (module, name) not in self._members:
            members = self._members[module, name] = {}
            home, node = self._find(module, name)
            if isinstance(node, ast.ClassDef):
                for member, found in _list_members(node):
                    members.setdefault(member, found)
                for base in _base_names(node):
                    for member, found in self.find_members(home, base).items():
                        members.setdefault(member, found)
        return self._members[module, name]

    def has_owner(self, need: Need) -> bool:
        """Return whether the class or the module exists that should have the attribute."""
        owner, _, _ = need.attribute.rpartition(".")
        return (
            bool(self.find_members(need.module, owner)) if owner else any(self._read(need.module))
        )

    def list_names(self, module: str) -> set[str]:
        """Return the names of a module that are not imported into it."""
        names = self._read(module).names
        return {name for name, node in names.items() if not isinstance(node, _Import)}

    def _find(self, module: str, name: str) -> tuple[str, ast.AST | _Import | None]:
        """Return the module that defines what ``name`` is in ``module``, and the definition.

        That is an import if another package defines it.
        """
        found = self._read(module)
        node = found.names.get(name)
        if isinstance(node, _Import) and _package(node.module) == _package(module):
            return self._find(*node)
        if node is None:
            stars = (star for star in found.stars if _package(star) == _package(module))
            inner = (self._find(star, name) for star in stars)
            return next((hit for hit in inner if hit[1] is not None), (module, None))
        return module, node

    def _read(self, module: str) -> _Module:
        if module not in self._modules:
            self._modules[module] = _Module({}, [])  # also ends a cycle of imports
            self._modules[module] = _parse(module)
        return self._modules[module]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _parse(module: str) -> _Module:
    """Read a module; it has no names if there is no such module, or none with sources."""
    names: dict[str, ast.AST | _Import] = {}
    stars: list[str] = []
    spec = _find_spec(module)
    source = spec and getattr(spec.loader, "get_source", lambda _: None)(module)
    if not spec or not source:
        return _Module(names, stars)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    for statement in _list_statements(ast.parse(source).body):
        if not isinstance(statement, ast.ImportFrom):
            for name in _list_bound(statement):
                names.setdefault(name, statement)
            continue
        origin = resolve_name("." * statement.level + (statement.module or ""), package)
        for alias in statement.names:
            if alias.name == "*":
                stars.append(origin)
            else:
                names.setdefault(alias.asname or alias.name, _Import(origin, alias.name))
    return _Module(names, stars)


def _find_spec(module: str) -> ModuleSpec | None:
    """Return a module's spec. Unlike ``importlib.util.find_spec``, do not import its packages."""
    path: Sequence[str] | None = None
    spec = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded else _ask_finders(name, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _ask_finders(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    # The finder of wrapt's import hooks calls `importlib.util.find_spec`.
    finders = (f for f in sys.meta_path if not f.__module__.startswith("wrapt"))
    specs = (finder.find_spec(name, path) for finder in finders)
    return next((spec for spec in specs if spec is not None), None)


def _list_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a scope, those within ``if``, ``try`` and ``with`` too."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.With)):
                yield from _list_statements(getattr(statement, field, ()))


def _list_bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a definition, an assignment or an import of modules binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _list_members(node: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a class defines in its body, and what its methods set on ``self`` and ``cls``."""
    for statement in _list_statements(node.body):
        for name in _list_bound(statement):
            yield name, statement
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id in ("self", "cls")
        ):
            yield inner.attr, inner


def _base_names(node: ast.ClassDef) -> Iterator[str]:
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base, ast.Name):
            yield base.id


def _parameters(node: ast.AST | _Import) -> set[str]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return set()
    arguments = node.args
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
