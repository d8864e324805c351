"""Engines that serve adapters with ``kv_b_proj`` of a DeepSeek-V3, against engines with merged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_module
from support.server import engine_environment


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ({}, False),
        ({}, True),
        ({"tensor_parallel_size": 2}, True),
    ],
    ids=["whole", "chunked", "chunked-tp2"],
)
def test_batch_of_adapters_equals_merged_weights(
    tmp_path: Path, options: dict[str, Any], chunks: bool
) -> None:
    """Prefills, decodes and, with ``chunks``, their context, all with and without an adapter."""
    ranks = options.get("tensor_parallel_size", 1)
    results = tmp_path / "results.json"
    environment = engine_environment(True, ranks) | {
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if ranks == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    job = {"family": "DeepSeek-V3", "options": options, "chunks": chunks, "results": str(results)}
    run_module("support.batch_engine", job, tmp_path / "log", environment, 900)
    found = json.loads(results.read_text())
    assert min(effect for effect in found["effects"] if effect) > 1
    assert max(found["errors"]) < 1e-4
    if ranks == 1:  # they are counted in this process
        paths = {"add_to_keys_and_values", "add_to_queries", "add_to_output"}
        assert {name for name, calls in found["calls"].items() if calls} == (
            paths | {"context"} if chunks else paths
        )
