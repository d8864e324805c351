"""Serve the same adapters with stock vLLM and with the plugin: ``python3 ci/demo.py``."""

from __future__ import annotations

import os
import subprocess
import sys

import environment


def main() -> int:
    """Create the environment and run the comparison in it; return its exit status."""
    python = environment.release_environment()
    return subprocess.call(
        [python, "-P", environment.ROOT / "ci" / "compare.py", *sys.argv[1:]],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
