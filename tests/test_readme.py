"""The tables of the README and of the benchmarks equal their data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from unittest import mock

import tomllib

from vllm_nway_lora.compat.releases import KNOWN, TESTED

ROOT = Path(__file__).resolve().parent.parent


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date() -> None:
    readme = script("ci/readme.py")
    for page in readme.PAGES:
        text = (ROOT / page).read_text()
        assert readme.render(text, page) == text, "run `python3 ci/readme.py`"


def test_the_table_of_experts_has_the_layouts_that_are_tested() -> None:
    from support.expert_files import build_files
    from support.layout_table import EXPERTS
    from support.moe import flat

    assert EXPERTS.keys() == build_files(flat(), False).keys()


def test_tables_and_plots_of_the_benchmarks_are_up_to_date() -> None:
    report = script("benchmarks/report.py")
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert report.render(text) == text, "run `python3 benchmarks/run.py report`"
    for name, draw in report.PLOTS.items():
        assert (ROOT / "benchmarks" / "results" / name).read_text() == draw()


def test_tested_releases_have_passed() -> None:
    matrix = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())
    assert tuple(matrix["release"]) == KNOWN
    passed = {matrix["default"]}  # this test runs with the suites of the default release
    for release in KNOWN:
        path = ROOT / "ci" / "results" / f"{release}.json"
        suites = json.loads(path.read_text())["suites"] if path.exists() else {}
        assert not any(counts["failed"] for counts in suites.values()), release
        if suites.get("layers", {}).get("passed"):
            passed.add(release)
    assert set(TESTED) == passed


def test_the_time_left_follows_the_speed_of_this_machine(tmp_path: Path) -> None:
    progress = script("ci/progress.py")
    path = tmp_path / "durations.json"
    path.write_text(json.dumps({"a": 10, "b": 300}))
    with mock.patch.object(progress.time, "monotonic", side_effect=[0.0, 20.0, 620.0]):
        run = progress.Progress(["a", "b"], path)
        assert run.finish("a") == "in 20 s, about 10 min left"
        assert run.finish("b") == "in 10 min"
    run.save()
    assert json.loads(path.read_text()) == {"a": 20, "b": 600}
