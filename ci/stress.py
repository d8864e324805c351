"""Run a long test: ``python3 ci/stress.py mutations`` (10,000 adapters) or ``soak`` (500 steps, TP=2).

The results are saved in ``ci/results/<test>-<release>.json``. ``--count`` changes the number of
adapters or steps.
"""

from __future__ import annotations

import os
import subprocess
import sys

import environment


def main() -> int:
    """Create the environment and run ``tests/support/stress.py`` in it; return its exit status."""
    python = environment.release_environment()
    results = environment.ROOT / "ci" / "results"
    return subprocess.call(
        [python, "-P", "-m", "support.stress", *sys.argv[1:], "--results", results],
        cwd=environment.ROOT,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(environment.ROOT / "tests"),
        },
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
