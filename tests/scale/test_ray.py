"""Ray on one and two local nodes, with the resource that vLLM's CPU platform does not name.

``python3 ci/scale.py tests`` installs Ray in a folder of its own and names it in ``NWAY_LORA_RAY``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from support.scale import Served
from support.scale_checks import Executor, check_executor


@pytest.mark.parametrize("nodes", [1, 2])
def test_adapters_on_two_ray_workers(served: Served, tmp_path: Path, nodes: int) -> None:
    environment = {
        "PYTHONPATH": os.environ["NWAY_LORA_RAY"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        # Each node counts its workers from 0: two nodes would bind both workers to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "NWAY_LORA_RAY_NODES": str(nodes),
    }
    # Ray ends its processes after the engine's, and its sockets need a shorter path than tmp_path.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment["RAY_TMPDIR"] = folder
        check_executor(served, tmp_path / "log", Executor("ray", 2, environment))
