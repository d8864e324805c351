"""Tests of an adapter on each module of three families, against engines with merged weights.

``python3 ci/oracle.py`` does the same for every family.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.processes import run_module
from support.server import engine_environment

#: K loaded into V too; a gate with a second name; a weight that is read past its layer.
FAMILIES = ("Gemma 4, K equals V", "Qwen2 MoE", "DeepSeek-V3")
#: These classes of vLLM have no LoRA on embeddings and heads.
REFUSED = re.compile(r"(lm_head|embed_tokens)$")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("oracle")
    job = {"families": FAMILIES, "results": str(folder), "release": "tested", "stock": False}
    environment = engine_environment(True, 1) | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    run_module("support.oracle", job, folder / "log", environment, 900)
    found: dict[str, Any] = json.loads((folder / "oracle-tested.json").read_text())["families"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_exact_or_refused(results: dict[str, Any], family: str) -> None:
    result = results[family]
    assert "not_run" not in result, result
    outcomes = {name: case["outcome"] for name, case in result["cases"].items()}
    expected = {name: "refused" if REFUSED.search(name) else "exact" for name in outcomes}
    assert outcomes == expected
    assert result["afterwards"]["outcome"] == "exact"
