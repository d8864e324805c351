"""Run pytest in a release's environment and read its report."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import environment

LIMIT = 3600  # seconds


def run_pytest(
    release: str,
    python: Path,
    arguments: Sequence[str],
    log: Path,
    folder: Path = environment.ROOT,
    **variables: str,
) -> Path:
    """Run pytest in a release's environment; return the path of its JUnit report.

    The report does not exist if pytest crashed or ran for longer than ``LIMIT``.
    """
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    # The script, because `python -m pytest` would import the sources in place of the wheel, and `-P`,
    # which prevents that, came with Python 3.11.
    command = [str(python), str(python.parent / "pytest"), "--junitxml", str(report), *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **variables}
    env |= environment.row(release).get("environment", {})
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return report


def split(suites: Sequence[str]) -> list[list[str]]:
    """Return the suites by process: most share one, which saves further imports of vLLM."""
    alone = environment.matrix()["suites"]["alone"]
    shared = [suite for suite in suites if suite not in alone]
    return [*([shared] if shared else []), *([suite] for suite in suites if suite in alone)]


def paths(suites: Sequence[str]) -> list[str]:
    """Return the arguments of pytest for some suites."""
    of = environment.matrix()["suites"]["paths"]
    return [argument for suite in suites for argument in of[suite]]


def count(report: Path, paths: Sequence[str] = ()) -> dict[str, int]:
    """Return how many tests below ``paths`` passed, failed (including errors) and were skipped.

    Without ``paths``, count every test.
    """
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0}
    modules = tuple(f"{path.removesuffix('.py').replace('/', '.')}." for path in paths)
    outcomes = [
        outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
        if f"{case.get('classname')}.".startswith(modules or "")
    ]
    return {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}


def outcome(case: ElementTree.Element) -> str:
    """Return ``passed``, ``failed`` or ``skipped``."""
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
