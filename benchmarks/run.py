"""Run the benchmarks in the default release's environment: ``python3 benchmarks/run.py WHAT``.

WHAT is ``layers``, ``startup``, ``engine``, ``transformers_peft``, ``costs``, ``gpu``, ``launches`` or ``report``. Further arguments are
passed to that script (``--help`` lists them). ``report`` writes the tables of ``benchmarks/README.md`` and the plots from the
saved results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

import environment

SCRIPTS = ("layers", "startup", "engine", "transformers_peft", "costs", "gpu", "launches", "report")


def main() -> int:
    """Create the environment and run a script in it; return its exit status."""
    if sys.argv[1:2] not in [[name] for name in SCRIPTS]:
        print(__doc__)
        return 2
    what, *arguments = sys.argv[1:]
    return subprocess.call(
        [environment.release_environment(), "-P", ROOT / "benchmarks" / f"{what}.py", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
