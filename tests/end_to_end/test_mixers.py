"""An engine that serves adapters with ``x_proj`` and ``dt_proj`` of Mamba, against merged weights."""

from __future__ import annotations

import json
from pathlib import Path

from support.processes import run_module
from support.server import engine_environment


def test_batches_of_prefills_and_decodes_equal_merged_weights(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    environment = engine_environment(True, 1) | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    job = {
        "family": "Mamba",
        "options": {"max_num_batched_tokens": 80, "enable_prefix_caching": False},
        "chunks": False,
        "results": str(results),
    }
    run_module("support.batch_engine", job, tmp_path / "log", environment, 900)
    found = json.loads(results.read_text())
    assert min(effect for effect in found["effects"] if effect) > 0.1
    assert max(found["errors"]) < 1e-4
    assert found["calls"]["mixed"]
