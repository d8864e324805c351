"""Executors other than multiprocessing: adapters are refused or served exactly on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.scale import Served
from support.scale_checks import Executor, check_executor

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
EXECUTORS = [
    Executor("uni", 1, {}),
    Executor("uni", 1, IN_PROCESS),
    Executor("external_launcher", 2, IN_PROCESS),
]


@pytest.mark.parametrize("executor", EXECUTORS, ids=["uni", "uni-in-process", "external-launcher"])
def test_good_adapters_are_exact_and_bad_ones_refused(
    served: Served, tmp_path: Path, executor: Executor
) -> None:
    check_executor(served, tmp_path / "log", executor)
