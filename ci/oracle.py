"""Compare an adapter on each module with merged weights: ``python3 ci/oracle.py [RELEASE] [FAMILY ...]``.

Every family of ``tests/support/oracle_families.py`` is served by a real engine on CPU. The results are
saved in ``ci/results/oracle-RELEASE.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import environment


def main() -> int:
    """Run the oracle in a release's environment; return its exit status."""
    releases = environment.matrix()["release"]
    names = sys.argv[1:]
    release = names.pop(0) if names and names[0] in releases else environment.matrix()["default"]
    python = environment.release_environment(release)
    job = {
        "families": names,
        "results": str(environment.ROOT / "ci" / "results"),
        "release": release,
        "stock": True,
    }
    return subprocess.call(
        [python, "-P", "-m", "support.oracle", json.dumps(job)],
        cwd=environment.ROOT,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(environment.ROOT / "tests"),
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
        },
        stdin=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
