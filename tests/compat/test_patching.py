"""Groups of patches on modules of this test's own: all or none, and undone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from vllm_nway_lora.compat.patching import Group, MissingAttributeError, Need, Patch, Patcher

MODULE = "patched_by_test"


class Target:
    def method(self, number: int) -> int:
        return number

    @classmethod
    def build(cls, number: int) -> tuple[type, int]:
        return cls, number


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module with a function, a class and a table."""
    module: Any = ModuleType(MODULE)
    module.function = lambda value: value
    module.Target = type("Target", (), dict(vars(Target)))
    module.TABLE = ("a",)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def replace_by(value: Any) -> Any:
    return lambda original: value


def patch(attribute: str, replacement: Any, *parameters: str) -> Patch:
    return Patch(f"patch-{attribute}", Need(MODULE, attribute, parameters), replacement)


def test_group_is_applied_and_undone(module: Any) -> None:
    originals = module.function, vars(module.Target)["build"], module.TABLE
    table = patch("TABLE", lambda original: ("b", *original))
    build = patch("Target.build", replace_by(classmethod(lambda cls, number: "patched")), "number")
    function = patch("function", replace_by(len), "value")
    patcher = Patcher()
    patcher.apply(Group(MODULE, (table, build, function), ()))
    assert patcher.applied == (table, build, function)
    assert module.TABLE == ("b", "a")
    assert module.Target.build(1) == "patched"
    assert module.function("abc") == 3
    patcher.undo()
    assert patcher.applied == ()
    assert (module.function, vars(module.Target)["build"], module.TABLE) == originals
    assert module.Target.build(1) == (module.Target, 1)


def test_group_is_applied_once(module: Any) -> None:
    group = Group(MODULE, (patch("TABLE", lambda original: ("b", *original)),), ())
    patcher = Patcher()
    patcher.apply(group)
    patcher.apply(group)
    assert module.TABLE == ("b", "a")


def test_inherited_attribute_is_inherited_again(module: Any) -> None:
    module.Inheriting = type("Inheriting", (module.Target,), {})
    patcher = Patcher()
    patcher.apply(Group(MODULE, (patch("Inheriting.method", replace_by(len)),), ()))
    assert module.Inheriting.method is len
    assert module.Target.method is not len
    patcher.undo()
    assert "method" not in vars(module.Inheriting)


def wrap(function: Any) -> Any:
    @functools.wraps(function)
    def other(value: Any) -> Any:
        return function(value)

    return other


def test_patch_that_others_have_replaced_is_not_applied(module: Any) -> None:
    function, table = patch("function", replace_by(len)), patch("TABLE", replace_by(("b",)))
    patcher = Patcher()
    patcher.apply(Group(MODULE, (function, table), ()))
    theirs = module.function = lambda value: len(value)
    assert patcher.applied == (table,)
    assert patcher.placed[function].current is theirs
    patcher.undo()
    assert module.function is theirs
    assert module.TABLE == ("a",)


def test_patch_that_others_have_wrapped_is_applied(module: Any) -> None:
    function = patch("function", replace_by(len))
    patcher = Patcher()
    patcher.apply(Group(MODULE, (function,), ()))
    theirs = module.function = wrap(wrap(module.function))
    assert patcher.applied == (function,)
    patcher.undo()
    assert module.function is theirs


def test_patch_whose_target_has_been_removed_is_not_applied(module: Any) -> None:
    patcher = Patcher()
    patcher.apply(Group(MODULE, (patch("function", replace_by(len)),), ()))
    del module.function
    assert patcher.applied == ()
    patcher.undo()
    assert not hasattr(module, "function")


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (Need(MODULE, "nothing"), "patched_by_test.nothing"),
        (Need(MODULE, "Nothing.method"), "patched_by_test.Nothing.method"),
        (Need("not_imported", "function"), "not_imported.function"),
        (
            Need(MODULE, "Target.method", ("number", "b", "a")),
            "the parameter a, b of patched_by_test.Target.method",
        ),
    ],
)
def test_missing_need_is_named_and_nothing_is_replaced(
    module: Any, need: Need, message: str
) -> None:
    original = module.function
    patcher = Patcher()
    group = Group(MODULE, (patch("function", replace_by(len)),), (), (need,))
    with pytest.raises(MissingAttributeError) as error:
        patcher.apply(group)
    assert str(error.value) == message
    assert patcher.applied == ()
    assert module.function is original


def test_every_missing_attribute_is_named_with_its_patch(module: Any) -> None:
    group = Group(MODULE, (patch("x", replace_by(1)), patch("y", replace_by(2))), ())
    with pytest.raises(MissingAttributeError) as error:
        Patcher().apply(group)
    assert str(error.value) == f"{MODULE}.x (patch-x), {MODULE}.y (patch-y)"


def test_replacement_that_cannot_be_imported_replaces_nothing(module: Any) -> None:
    def fail(original: Any) -> Any:
        raise ImportError("no such name")

    original = module.function
    group = Group(MODULE, (patch("function", replace_by(len)), patch("TABLE", fail)), ())
    with pytest.raises(MissingAttributeError, match="what this package imports: no such name"):
        Patcher().apply(group)
    assert module.function is original
