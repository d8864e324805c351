"""Run every check and test, from a fresh clone: ``python3 ci/test.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment
import runner


def main() -> int:
    """Lint and check types; run all tests on the default release and some suites on others.

    With ``--lint`` only the former; other arguments go to pytest, on the default release alone.
    Returns 0 if everything passed.
    """
    lint = environment.lint_environment()
    environment.run(lint, "-m", "ruff", "check")
    environment.run(lint, "-m", "ruff", "format", "--check")
    environment.run(lint, "-m", "mypy")
    if sys.argv[1:] == ["--lint"]:
        return 0
    python = environment.release_environment()
    if sys.argv[1:]:
        return 0 if run_default(python, sys.argv[1:]) else 1
    # What is one engine per release is in ci/matrix.py.
    one_per_release = ["tests/engine/test_release.py", "tests/engine/test_release_stock.py"]
    engines = ["tests/engine", *(f"--ignore={path}" for path in one_per_release)]
    with ThreadPoolExecutor() as pool:
        # Beside the engines, whose starts leave a core idle.
        rest = pool.submit(run_suites, python)
        passed = run_default(python, ["tests/unit/test_readme.py", *engines])
        passed = rest.result() and passed
    return 0 if passed else 1


def run_default(python: Path, arguments: list[str]) -> bool:
    """Run pytest on the default release and show what it says."""
    environment.say("running the tests")
    status = subprocess.call(
        [python, "-P", "-m", "pytest", *arguments],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    return status == 0


def run_suites(default: Path) -> bool:
    """Run the suites of ``eras`` in ci/matrix.toml; show the log of those that fail.

    ``default`` is the Python of the default release, whose environment is in use by then.
    """
    passed = True
    for release, suites in environment.matrix()["eras"].items():
        is_default = release == environment.matrix()["default"]
        python = default if is_default else environment.release_environment(release)
        log = environment.CACHE / "logs" / f"{release}.log"
        log.parent.mkdir(exist_ok=True)
        paths = [
            path for suite in suites for path in environment.matrix()["suites"]["paths"][suite]
        ]
        counts = runner.count(runner.run_pytest(release, python, paths, log))
        environment.say(f"vLLM {release}: {counts['passed']} passed, {counts['failed']} failed")
        if counts["failed"] or not counts["passed"]:
            print(log.read_text())
            passed = False
    return passed


if __name__ == "__main__":
    sys.exit(main())
