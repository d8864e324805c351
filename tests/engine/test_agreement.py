"""The comparison of the plugin between the processes of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.executors import Executor, Worker
from support.processes import evaluate

import vllm_nway_lora
from vllm_nway_lora.engine import agreement
from vllm_nway_lora.engine.agreement import RankError

#: The report of a rank that agrees with the engine core.
REPORT = (vllm_nway_lora.__version__, "1", ("a", "b", "in the core too"))
EXPECTED = ("a", "b")


@pytest.fixture(autouse=True)
def default_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_NWAY_LORA", raising=False)


def test_equal_reports_agree() -> None:
    assert agreement.compare_ranks([REPORT] * 3, EXPECTED) == ""
    # A worker in a process of its own lacks the engine core's patches.
    assert agreement.compare_ranks([(*REPORT[:2], ("b", "a")), REPORT], EXPECTED) == ""


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "rank 1: not loaded"),
        (("0.0.1", "1", ("a", "b")), "rank 1: 0.0.1 (VLLM_NWAY_LORA=1; patches: a, b)"),
        ((REPORT[0], "lenient", ("a", "b")), "(VLLM_NWAY_LORA=lenient; patches: a, b)"),
        ((REPORT[0], "0", ()), "(VLLM_NWAY_LORA=0; patches: none)"),
        ((REPORT[0], "1", ("a",)), "(VLLM_NWAY_LORA=1; patches: a)"),
    ],
)
def test_difference_is_named(other: Any, words: str) -> None:
    message = agreement.compare_ranks([REPORT, other], EXPECTED)
    assert words in message
    assert "Install the same version on every node" in message


def test_ranks_that_differ_from_the_engine_core_are_named() -> None:
    assert "rank 0: not loaded; rank 1: not loaded" in agreement.compare_ranks(
        [None, None], EXPECTED
    )


def test_reporter_runs_where_the_package_is_not_installed() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")  # vLLM sends functions to its workers with it
    code = """
        import json, pickle, sys
        sys.modules["vllm_nway_lora"] = None  # an import of it fails
        print(json.dumps(pickle.loads(bytes.fromhex(sys.argv[1]))("a worker")))
    """
    reporter = cloudpickle.dumps(agreement._reporter()).hex()
    assert evaluate(code, reporter) is None


@pytest.mark.parametrize("is_on", [False, True], ids=["off", "on"])
def test_engine_compares_ranks_only_with_lora(is_on: bool) -> None:
    executor = Executor(Worker())
    executor.collective_rpc = lambda method: [None]  # type: ignore[assignment,misc,method-assign]
    shut_down = []
    executor.shutdown = lambda: shut_down.append(True)  # type: ignore[attr-defined]
    lora_config = object() if is_on else None
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(lora_config=lora_config), model_executor=executor
    )

    def start() -> str:
        return agreement.initialize_kv_caches(lambda: "started", engine, (), {})

    if is_on:
        with pytest.raises(RankError, match="rank 0: not loaded"):
            start()
    else:
        assert start() == "started"
    assert shut_down == [True] * is_on


def test_workers_of_this_release_have_patches() -> None:
    pytest.importorskip("vllm")
    assert "admission" in agreement._expected_patches()
