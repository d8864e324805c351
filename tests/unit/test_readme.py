"""The README's tables say what their data says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "ci" / "readme.py")
    assert spec
    assert spec.loader
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text()
    assert readme.render(text) == text, "run `python3 ci/readme.py`"
