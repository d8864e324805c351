"""The look-up of attributes in the sources of a package of this test's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from vllm_nway_lora.compat.patching import Need
from vllm_nway_lora.compat.sources import Sources

FILES = {
    "__init__.py": "from .low import *",
    "low.py": """
        from abc import ABC

        if ABC:
            LIMIT: int = 3
            HALF, WHOLE = 1, 2
        else:
            import json

        def function(a, /, b, *, c, **others): ...

        class Low(ABC):
            size = 1
            name: str

            class Inner: ...

            def __init__(self):
                self.width, self.depth = 1, 2
                self.count: int = 3
                other = self
                other.elsewhere = 4
                print(self.only_read)

            @classmethod
            def build(cls):
                cls.made = True
    """,
    "broken.py": "raise ImportError('must not be imported')\nVALUE = 1",
    "inner/__init__.py": "",
    "inner/high.py": """
        import low as renamed
        from typing import Generic
        from collections.abc import Sized
        from looked_up_by_test import Low as Base
        from ..low import function as imported

        class High(Base[int], Generic):
            async def method(self, number): ...
    """,
}
PACKAGE = "looked_up_by_test"
HIGH, LOW = f"{PACKAGE}.inner.high", f"{PACKAGE}.low"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    for name, text in FILES.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield Sources()
    assert not [name for name in sys.modules if name.startswith(PACKAGE)]


@pytest.mark.parametrize(
    "need",
    [
        Need(LOW, "LIMIT"),
        Need(LOW, "WHOLE"),
        Need(LOW, "json"),
        Need(LOW, "function", ("a", "b", "c")),
        Need(PACKAGE, "function", ("c",)),
        Need(HIGH, "imported", ("a",)),
        Need(HIGH, "Sized"),
        Need(HIGH, "renamed"),
        *(Need(LOW, f"Low.{name}") for name in ("size", "name", "Inner", "__init__", "made")),
        *(Need(HIGH, f"High.{name}") for name in ("size", "width", "depth", "count", "build")),
        Need(HIGH, "High.method", ("number",)),
        Need(f"{PACKAGE}.broken", "VALUE"),
    ],
    ids=str,
)
def test_attribute_is_found(sources: Sources, need: Need) -> None:
    assert sources.find_fault(need) == ""
    assert sources.has_owner(need)


@pytest.mark.parametrize(
    ("need", "fault"),
    [
        (Need(LOW, "nothing"), f"{LOW}.nothing"),
        (Need(LOW, "width"), f"{LOW}.width"),
        (Need(LOW, "Low.elsewhere"), f"{LOW}.Low.elsewhere"),
        (Need(LOW, "Low.only_read"), f"{LOW}.Low.only_read"),
        (Need(LOW, "Low.method"), f"{LOW}.Low.method"),
        (Need(LOW, "function", ("b", "y", "x")), f"the parameter x, y of {LOW}.function"),
        (Need(LOW, "function", ("others",)), f"the parameter others of {LOW}.function"),
        (Need(HIGH, "High.method", ("n",)), f"the parameter n of {HIGH}.High.method"),
    ],
    ids=str,
)
def test_missing_attribute_is_named(sources: Sources, need: Need, fault: str) -> None:
    assert sources.find_fault(need) == fault


@pytest.mark.parametrize(
    "need",
    [Need(LOW, "Nothing.x"), Need(f"{PACKAGE}.nothing", "x"), Need("nothing.at.all", "X.x")],
    ids=str,
)
def test_missing_class_or_module_is_no_owner(sources: Sources, need: Need) -> None:
    assert not sources.has_owner(need)
    assert sources.find_fault(need) == str(need)


def test_imported_module_is_read_through_its_loader(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader can change what it reads from the disk."""

    class Loader:
        def get_source(self, module: str) -> str:
            return "renamed = 1"

    import importlib.util

    spec = importlib.util.spec_from_loader(LOW, loader=None)
    spec.loader = Loader()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, LOW, importlib.util.module_from_spec(spec))
        assert sources.find_fault(Need(LOW, "renamed")) == ""
        assert sources.find_fault(Need(LOW, "LIMIT")) == f"{LOW}.LIMIT"
