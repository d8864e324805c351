"""The README's tables say what their data says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import tomllib

from vllm_nway_lora.releases import KNOWN, TESTED

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "ci" / "readme.py")
    assert spec
    assert spec.loader
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text()
    assert readme.render(text) == text, "run `python3 ci/readme.py`"


def test_tested_releases_are_those_that_have_passed() -> None:
    matrix = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())
    assert tuple(matrix["release"]) == KNOWN
    passed = {matrix["default"]}  # by what runs this test
    for release in KNOWN:
        path = ROOT / "ci" / "results" / f"{release}.json"
        suites = json.loads(path.read_text())["suites"] if path.exists() else {}
        assert not any(counts["failed"] for counts in suites.values()), release
        if suites.get("layers", {}).get("passed"):
            passed.add(release)
    assert set(TESTED) == passed
