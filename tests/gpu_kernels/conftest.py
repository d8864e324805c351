"""Setup for tests of vLLM's GPU kernels (see ``support.gpu``); they need a process of their own."""

from __future__ import annotations

import pytest
from support import gpu

gpu.prepare()

# vLLM's CUDA platform builds attention only with its compiled extensions.
collect_ignore = ["test_families.py"] if gpu.mode() == "cuda" else []


@pytest.fixture(scope="session", autouse=True)
def _initialize(record_testsuite_property: pytest.RecordProperty) -> None:
    from vllm_nway_lora.diagnosis import offline

    record_testsuite_property("device", gpu.card())
    offline.initialize()


def pytest_report_header() -> str:
    return f"LoRA kernels: {gpu.card()}"
