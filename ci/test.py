"""Run every check and test, from a fresh clone: ``python3 ci/test.py``."""

from __future__ import annotations

import os
import subprocess
import sys

import environment
import runner


def main() -> int:
    """Lint and check types; run all tests on the default release and some suites on other eras'.

    With ``--lint`` only the former; other arguments go to pytest, on the default release alone.
    Returns 0 if everything passed.
    """
    lint = environment.lint_environment()
    environment.run(lint, "-m", "ruff", "check")
    environment.run(lint, "-m", "mypy")
    if sys.argv[1:] == ["--lint"]:
        return 0
    python = environment.release_environment()
    environment.say("running the tests")
    # Families run on the newest release, below; what is one engine per release, in ci/matrix.py.
    elsewhere = [
        "tests/families",
        "tests/engine/test_release.py",
        "tests/engine/test_release_stock.py",
    ]
    paths = sys.argv[1:] or ["tests", *(f"--ignore={path}" for path in elsewhere)]
    status = subprocess.call(
        [python, "-P", "-m", "pytest", *paths],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    matrix = environment.matrix()
    for release in () if sys.argv[1:] else matrix["eras"]:
        python = environment.release_environment(release)
        log = environment.CACHE / "logs" / f"{release}.log"
        log.parent.mkdir(exist_ok=True)
        suites = ["unit", "layers", *(["families"] if release in matrix["families"] else [])]
        paths = [path for suite in suites for path in matrix["suites"]["paths"][suite]]
        report = runner.run_pytest(release, python, paths, log)
        counts = runner.count(report)
        environment.say(f"vLLM {release}: {counts['passed']} passed, {counts['failed']} failed")
        if counts["failed"] or not counts["passed"]:
            print(log.read_text())
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
