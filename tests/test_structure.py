"""The repository's structure: the subpackages' tests and the length of modules."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 300
#: Folders of data tables.
TABLES = ("tests/support/families/",)
SUBPACKAGES = [path.parent.name for path in sorted((ROOT / "vllm_nway_lora").glob("*/__init__.py"))]


def test_no_module_is_longer_than_the_limit() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in ("vllm_nway_lora", "ci", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(lengths) > 100
    too_long = {path for path, lines in lengths.items() if lines > MAX_LINES}
    assert {path for path in too_long if not path.startswith(TABLES)} == set()


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_every_subpackage_has_tests(subpackage: str) -> None:
    assert list((ROOT / "tests" / subpackage).glob("test_*.py"))
