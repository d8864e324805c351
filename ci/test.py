"""Run every check and test, from a fresh clone: ``python3 ci/test.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import environment
import runner


def main() -> int:
    """Lint and check types; run all tests on the default release and some suites on other eras'.

    With ``--lint`` only the former; other arguments go to pytest, on the default release alone.
    Returns 0 if everything passed.
    """
    lint = environment.lint_environment()
    environment.run(lint, "-m", "ruff", "check")
    environment.run(lint, "-m", "ruff", "format", "--check")
    environment.run(lint, "-m", "mypy")
    if sys.argv[1:] == ["--lint"]:
        return 0
    environment.wheel()
    with ThreadPoolExecutor() as pool:
        # Beside the default's tests, which leave a core idle whenever an engine starts.
        eras = pool.submit(run_eras) if not sys.argv[1:] else None
        passed = run_default(sys.argv[1:])
        if eras:
            passed = eras.result() and passed
    return 0 if passed else 1


def run_default(paths: list[str]) -> bool:
    """Run all tests, or those that ``paths`` names, on the default release."""
    python = environment.release_environment()
    environment.say("running the tests")
    # Families run on the newest release, below; what is one engine per release, in ci/matrix.py.
    elsewhere = [
        "tests/families",
        "tests/engine/test_release.py",
        "tests/engine/test_release_stock.py",
    ]
    status = subprocess.call(
        [
            python,
            "-P",
            "-m",
            "pytest",
            *(paths or ["tests", *(f"--ignore={e}" for e in elsewhere)]),
        ],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    return status == 0


def run_eras() -> bool:
    """Run some suites on releases of other eras; show the log of those that fail."""
    passed = True
    for release, suites in environment.matrix()["eras"].items():
        python = environment.release_environment(release)
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
