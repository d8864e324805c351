"""Qwen3.5 on a real server, every adapter against PEFT: logprobs, and greedy tokens over 16 steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from support.adapters import QWEN3_5, Served, make, prompts
from support.checkpoints import save_qwen3_5
from support.foretold import foretell
from support.server import Server, ServerError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make(tmp_path_factory.mktemp("qwen3_5"), save_qwen3_5, QWEN3_5)


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
    made: Setup = request.param
    return made


@pytest.fixture(scope="module")
def server(
    setup: Setup, checkpoint: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with the plugin on, half of the adapters given on its command line."""
    at_start = list(checkpoint.adapters)[::2]
    arguments = ["--lora-modules", *(f"{name}={checkpoint.adapters[name]}" for name in at_start)]
    if setup.fully_sharded:
        arguments.append("--fully-sharded-loras")
    with Server(
        checkpoint.folder,
        tmp_path_factory.mktemp("server") / "log",
        *arguments,
        plugin=True,
        tensor_parallel_size=setup.tensor_parallel_size,
        compiled=setup.compiled,
    ) as running:
        for name, folder in checkpoint.adapters.items():
            if name not in at_start:
                running.load(name, folder)
        yield running


def test_every_adapter_equals_peft(server: Server, setup: Setup, checkpoint: Served) -> None:
    """And ``check`` has said so."""
    for name in checkpoint.adapters:
        for prompt in prompts():
            comparison = checkpoint.reference.compare(name, server.complete(name, prompt))
            assert comparison.exact, (name, comparison)
    foretold = foretell(
        checkpoint.folder,
        checkpoint.adapters,
        ["--fully-sharded-loras"] * setup.fully_sharded,
        plugin=True,
        tensor_parallel_size=setup.tensor_parallel_size,
    )
    assert foretold == dict.fromkeys(checkpoint.adapters, "exact")


def test_adapters_share_batches(server: Server, checkpoint: Served) -> None:
    requests = [(name, prompt) for prompt in prompts() for name in checkpoint.adapters]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = pool.map(lambda r: server.complete(*r, score_prompt=False), requests)
        for (name, _), answer in zip(requests, answers, strict=True):
            comparison = checkpoint.reference.compare(name, answer)
            assert comparison.exact, (name, comparison)


def test_the_base_model_is_as_it_was(server: Server, checkpoint: Served) -> None:
    for prompt in prompts():
        comparison = checkpoint.reference.compare(None, server.complete(server.models()[0], prompt))
        assert comparison.error < 0.2, comparison


def test_unload_and_load_again(server: Server, checkpoint: Served) -> None:
    for name in ("z", "qkv"):
        server.unload(name)
        with pytest.raises(ServerError, match="404"):
            server.complete(name, prompts(1)[0])
    # In the other order, so that each gets the slot that the other had.
    for name in ("qkv", "z"):
        server.load(name, checkpoint.adapters[name])
    for name in checkpoint.adapters:
        comparison = checkpoint.reference.compare(name, server.complete(name, prompts(1)[0]))
        assert comparison.exact, (name, comparison)


def test_the_plugin_says_that_it_is_on(server: Server) -> None:
    said = [line for line in server.log.read_text().splitlines() if "] vllm-nway-lora " in line]
    lines = [line for line in said if "is on for vLLM" in line]
    assert lines
    assert all(" INFO " in line for line in said)
    workers = {line.partition(")")[0] for line in lines}
    assert len(workers) == len(lines)  # one line per worker, none elsewhere


def test_stock_vllm_refuses_z_alone(checkpoint: Served, tmp_path: Path) -> None:
    """The defect that this package mends; fails when upstream mends it (vllm-project/vllm#57851)."""
    foretold = foretell(
        checkpoint.folder, checkpoint.adapters, plugin=False, tensor_parallel_size=1
    )
    assert {name for name, word in foretold.items() if word != "exact"} == {"z"}
    assert foretold["z"] == "refused"
    with Server(checkpoint.folder, tmp_path / "log", plugin=False) as stock:
        with pytest.raises(ServerError, match="Cannot determine how to split lora_b with 512 rows"):
            stock.load("z", checkpoint.adapters["z"])
        for name in ("qkv+z", "qkv", "a", "b", "all"):
            stock.load(name, checkpoint.adapters[name])
            comparison = checkpoint.reference.compare(name, stock.complete(name, prompts(1)[0]))
            assert comparison.exact, (name, comparison)
        assert "] vllm-nway-lora " not in stock.log.read_text()
