"""Tests of Qwen3.5 on a real server: every adapter is compared with PEFT.

The tests compare logprobs, and the greedy tokens of 16 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from support.adapters import QWEN3_5, ServedModel, prompts, save_served_model
from support.checkpoints import save_qwen3_5
from support.predictions import predict_outcomes
from support.relayouts import RELAYOUTS
from support.server import Server, ServerError

from vllm_nway_lora.diagnosis.report import Outcome


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return save_served_model(tmp_path_factory.mktemp("qwen3_5"), save_qwen3_5, QWEN3_5)


class Setup(NamedTuple):
    tensor_parallel_size: int
    fully_sharded: bool
    compiled: bool


@pytest.fixture(
    scope="module",
    params=[Setup(1, False, True), Setup(1, True, False), Setup(2, False, False), Setup(2, True, True)],
    ids=lambda setup: (
        f"tp{setup.tensor_parallel_size}{'-sharded' * setup.fully_sharded}"
        f"-{'compiled' if setup.compiled else 'eager'}"
    ),
)  # fmt: skip
def setup(request: pytest.FixtureRequest) -> Setup:
    chosen: Setup = request.param
    return chosen


@pytest.fixture(scope="module")
def server(
    setup: Setup, served: ServedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Yield a server with the plugin and all adapters.

    Half of the adapters are loaded from the command line, the others by requests.
    """
    at_start = list(served.adapters)[::2]
    arguments = ["--max-lora-rank", "32"]  # for parts that are folded
    arguments += ["--lora-modules", *(f"{name}={served.adapters[name]}" for name in at_start)]
    if setup.fully_sharded:
        arguments.append("--fully-sharded-loras")
    with Server(
        served.folder,
        tmp_path_factory.mktemp("server") / "log",
        *arguments,
        plugin=True,
        tensor_parallel_size=setup.tensor_parallel_size,
        compiled=setup.compiled,
    ) as running:
        for name, folder in served.adapters.items():
            if name not in at_start:
                running.load(name, folder)
        yield running


def test_every_adapter_equals_peft_and_prediction(
    server: Server, setup: Setup, served: ServedModel
) -> None:
    for name in served.adapters:
        for prompt in prompts():
            comparison = served.reference.compare(name, server.complete(name, prompt))
            assert comparison.is_exact, (name, comparison)
    predicted = predict_outcomes(
        served.folder,
        served.adapters,
        ["--fully-sharded-loras"] * setup.fully_sharded,
        plugin=True,
        tensor_parallel_size=setup.tensor_parallel_size,
    )
    assert predicted == dict.fromkeys(served.adapters, Outcome.EXACT)


@pytest.mark.parametrize("layout", RELAYOUTS)
def test_other_layouts_equal_peft(
    server: Server, served: ServedModel, tmp_path: Path, layout: str
) -> None:
    adapter, write = RELAYOUTS[layout]
    name = f"{adapter} in another layout"
    server.load(name, write(served.adapters[adapter], tmp_path / "adapter"))
    try:
        for prompt in prompts():
            comparison = served.reference.compare(adapter, server.complete(name, prompt))
            assert comparison.is_exact, comparison
    finally:
        server.unload(name)
    assert f"LoRA adapter '{name}'" in server.log.read_text()


def test_adapters_in_one_batch_equal_peft(server: Server, served: ServedModel) -> None:
    requests = [(name, prompt) for prompt in prompts() for name in served.adapters]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = pool.map(lambda r: server.complete(*r, score_prompt=False), requests)
        for (name, _), answer in zip(requests, answers, strict=True):
            comparison = served.reference.compare(name, answer)
            assert comparison.is_exact, (name, comparison)


def test_base_model_equals_transformers(server: Server, served: ServedModel) -> None:
    for prompt in prompts():
        comparison = served.reference.compare(None, server.complete(server.models()[0], prompt))
        assert comparison.error < 0.2, comparison


def test_unloaded_adapters_are_gone_and_load_again(server: Server, served: ServedModel) -> None:
    for name in ("z", "qkv"):
        server.unload(name)
        with pytest.raises(ServerError, match="404"):
            server.complete(name, prompts(1)[0])
    # Reverse order, so each adapter gets the slot that the other one had.
    for name in ("qkv", "z"):
        server.load(name, served.adapters[name])
    for name in served.adapters:
        comparison = served.reference.compare(name, server.complete(name, prompts(1)[0]))
        assert comparison.is_exact, (name, comparison)


def test_each_worker_logs_once_that_plugin_is_on(server: Server) -> None:
    log = server.log.read_text().splitlines()
    plugin_lines = [line for line in log if "] vllm-nway-lora " in line]
    lines = [line for line in plugin_lines if "is on for vLLM" in line]
    assert lines
    assert all(" INFO " in line for line in plugin_lines)
    workers = {line.partition(")")[0] for line in lines}
    assert len(workers) == len(lines)


def test_stock_vllm_refuses_z_alone(served: ServedModel, tmp_path: Path) -> None:
    """Fails if a later release of vLLM fixes this defect (vllm-project/vllm#57851)."""
    predicted = predict_outcomes(
        served.folder, served.adapters, plugin=False, tensor_parallel_size=1
    )
    exact = dict.fromkeys(served.adapters, Outcome.EXACT)
    assert predicted == exact | {"z": Outcome.REFUSED}
    with Server(served.folder, tmp_path / "log", plugin=False) as stock:
        with pytest.raises(ServerError, match="Cannot determine how to split lora_b with 512 rows"):
            stock.load("z", served.adapters["z"])
        for name in ("qkv+z", "qkv", "a", "b", "all"):
            stock.load(name, served.adapters[name])
            comparison = served.reference.compare(name, stock.complete(name, prompts(1)[0]))
            assert comparison.is_exact, (name, comparison)
        assert "] vllm-nway-lora " not in stock.log.read_text()
