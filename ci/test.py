"""Run every check and every test of a fresh clone: ``python3 ci/test.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment
import runner


def main() -> int:
    """Lint, check types, run all tests on the default release and some suites on other releases.

    With ``--lint``, only lint and check types. Other arguments are passed to pytest, which then runs
    on the default release only. Return 0 if everything passed.
    """
    lint = environment.lint_environment()
    environment.run(lint, "-m", "ruff", "check")
    environment.run(lint, "-m", "ruff", "format", "--check")
    environment.run(lint, "-m", "mypy")
    environment.run(lint.parent / "lint-imports")
    if sys.argv[1:] == ["--lint"]:
        return 0
    python = environment.release_environment()
    if sys.argv[1:]:
        return 0 if run_default(python, sys.argv[1:]) else 1
    # ci/matrix.py runs these two, with one engine per release.
    one_per_release = [
        f"tests/end_to_end/{name}.py" for name in ("test_release", "test_release_stock")
    ]
    engines = ["tests/end_to_end", *(f"--ignore={path}" for path in one_per_release)]
    engines += ["tests/moe/test_engine.py", "tests/quantised/test_engine.py"]
    with ThreadPoolExecutor() as pool:
        # In parallel with the engines: an engine that starts leaves a core idle.
        rest = pool.submit(run_suites, python)
        passed = run_default(
            python,
            ["tests/test_readme.py", "tests/test_docs.py", "tests/test_structure.py", *engines],
        )
        passed = rest.result() and passed
    return 0 if passed else 1


def run_default(python: Path, arguments: list[str]) -> bool:
    """Run pytest on the default release and show its output; return whether it passed."""
    environment.say("running the tests")
    status = subprocess.call(
        [python, "-P", "-m", "pytest", *arguments],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    return status == 0


def run_suites(default: Path) -> bool:
    """Run the suites of ``eras`` in ci/matrix.toml; show the log of each release that fails.

    ``default`` is the Python of the default release. The engines use its environment at the
    same time, so the wheel must not be installed in it again. Return whether everything passed.
    """
    passed = True
    for release, suites in environment.matrix()["eras"].items():
        is_default = release == environment.matrix()["default"]
        python = default if is_default else environment.release_environment(release)
        folder = environment.CACHE / "logs"
        folder.mkdir(exist_ok=True)
        for names in runner.split(suites):
            log = folder / f"{release}-{names[0]}.log"
            counts = runner.count(runner.run_pytest(release, python, runner.paths(names), log))
            environment.say(
                f"vLLM {release}, {', '.join(names)}: {counts['passed']} passed, "
                f"{counts['failed']} failed"
            )
            if counts["failed"] or not counts["passed"]:
                print(log.read_text())
                passed = False
    return passed


if __name__ == "__main__":
    sys.exit(main())
