"""Run every check and test, from a fresh clone: ``python3 ci/test.py [pytest arguments]``."""

from __future__ import annotations

import os
import subprocess
import sys

import environment


def main() -> int:
    """Lint, check types, then run pytest on the wheel; return pytest's exit status."""
    lint = environment.lint_environment()
    environment.run(lint, "-m", "ruff", "check")
    environment.run(lint, "-m", "mypy")
    python = environment.release_environment()
    environment.say("running the tests")
    return subprocess.call(
        [python, "-P", "-m", "pytest", *sys.argv[1:]],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
