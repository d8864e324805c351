"""Ray on one local node, with the resource that vLLM's CPU platform does not name.

``python3 ci/scale.py tests`` installs Ray in a folder of its own and names it in ``NWAY_LORA_RAY``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.scale import Served
from support.scale_checks import Executor, check_executor


@pytest.mark.parametrize("ranks", [2])
def test_adapters_on_ray_workers(served: Served, tmp_path: Path, ranks: int) -> None:
    environment = {"PYTHONPATH": os.environ["NWAY_LORA_RAY"], "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_HOST_IP": "127.0.0.1"}
    check_executor(served, tmp_path / "log", Executor("ray", ranks, environment))
