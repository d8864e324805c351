"""Compare ``check`` with a worker on published configurations: ``python3 ci/published.py [RELEASE] [NAME ...]``.

For each configuration of ``tests/published``, PEFT makes adapters on transformers' class. ``check``
says how they are served, and a worker's path loads them and must say the same, word by word. The rows
are saved in ``ci/results/published-RELEASE.json``, from which ``ci/readme.py`` writes ``docs/models.md``.
A run that was stopped is continued, unless a source has changed. The exit status is 1 if ``check``
crashes, cannot tell, or differs from the worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment

#: What the rows depend on, beside the release.
SOURCES = (
    *("vllm_nway_lora/**/*.py", "tests/published/*.json"),
    *("tests/support/published*.py", "tests/support/shrunk.py", "tests/support/worker.py"),
)


def main() -> int:
    """Examine the configurations in a release's environment; return 1 if a row has a fault."""
    releases = environment.matrix()["release"]
    names = sys.argv[1:]
    release = names.pop(0) if names and names[0] in releases else environment.matrix()["default"]
    out = path(release)
    python = environment.release_environment(release)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # A process that has run a parallel region cannot be forked (libgomp).
    env |= {"PYTHONPATH": str(environment.ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    # vLLM's messages have sets of names in them.
    env |= {"PYTHONHASHSEED": "0", **environment.row(release).get("environment", {})}
    command = [str(python), "-P", "-m", "support.published_walk", str(out), digest(), *names]
    subprocess.run(command, check=True, cwd=environment.ROOT, env=env)
    faults = find_faults(json.loads(out.read_text()))
    print("\n".join(faults) or "check and the worker agree on every row")
    return 1 if faults else 0


def path(release: str) -> Path:
    """Return the path of a release's result."""
    return environment.ROOT / "ci" / "results" / f"published-{release}.json"


def digest() -> str:
    """Return a digest of the sources that the rows depend on."""
    total = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(environment.ROOT.glob(pattern)):
            total.update(f"{file.relative_to(environment.ROOT)}\n".encode() + file.read_bytes())
    return total.hexdigest()[:16]


def find_faults(result: dict[str, Any]) -> list[str]:
    """Return one line per row with a fault."""
    return [
        f"{case}, {row['adapter']}: {row['fault']}"
        for case, rows in result["rows"].items()
        for row in rows
        if "fault" in row
    ]


if __name__ == "__main__":
    sys.exit(main())
