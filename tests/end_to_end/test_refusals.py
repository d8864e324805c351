"""Tests of refusals on real engines: the server keeps serving exactly; stock vLLM does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import damage
from support.adapters import Reference, prompts, save_adapter
from support.checkpoints import save_qwen3_5
from support.predictions import predict_outcomes
from support.server import Server, ServerError
from support.stress import Soak

from vllm_nway_lora.diagnosis.report import Outcome

MODULES = ("in_proj_qkv", "in_proj_z", "q_proj", "down_proj")

#: Fewer slots than adapters, so loading a fourth adapter evicts the least recently used one.
SLOTS = ("--max-loras", "3", "--max-cpu-loras", "3")


class Adapters(NamedTuple):
    """A checkpoint with good and bad adapters.

    Attributes:
        checkpoint: the model's folder.
        good: name -> adapter folder.
        bad: name of the damage -> (adapter folder, part of the refusal's message).
        reference: PEFT with the good adapters.
    """

    checkpoint: Path
    good: dict[str, Path]
    bad: dict[str, tuple[Path, str]]
    reference: Reference


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    root = tmp_path_factory.mktemp("refusals")
    checkpoint = save_qwen3_5(root / "model")
    good = {
        name: save_adapter(checkpoint, root / name, MODULES, seed)
        for seed, name in enumerate("abcd")
    }
    bad = {
        change.__name__: (damage.copy_adapter(good["a"], root / change.__name__, change), message)
        for change, message in damage.DAMAGES.items()
    }
    return Adapters(checkpoint, good, bad, Reference(checkpoint, good))


@pytest.fixture(scope="module")
def server(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(adapters.checkpoint, log, *SLOTS, plugin=True, tensor_parallel_size=2) as running:
        yield running


def assert_exact(server: Server, adapters: Adapters, name: str, served_as: str = "") -> None:
    """Assert that a good adapter, served under ``served_as`` or its own name, equals PEFT."""
    answer = server.complete(served_as or name, prompts(1)[0])
    comparison = adapters.reference.compare(name, answer)
    assert comparison.is_exact, (name, comparison)


def test_good_adapter_is_exact_after_refused_one(server: Server, adapters: Adapters) -> None:
    """Also tests that ``check_adapter`` predicts the outcomes, except for a NaN: it reads no values."""
    folders = adapters.good | {bad: folder for bad, (folder, _) in adapters.bad.items()}
    expected = {
        name: Outcome.REFUSED if name in adapters.bad else Outcome.EXACT for name in folders
    }
    predicted = predict_outcomes(adapters.checkpoint, folders, plugin=True, tensor_parallel_size=2)
    assert predicted == expected | {damage.insert_nan.__name__: Outcome.EXACT}
    for number, (bad, (folder, message)) in enumerate(adapters.bad.items()):
        with pytest.raises(ServerError) as error:
            server.load(bad, folder)
        assert message in str(error.value)
        # vLLM's server replaces paths in its answers. All ranks raise the same error, which is
        # therefore reported only once.
        assert str(error.value).startswith(
            f"500: Call to add_lora method failed: LoRA adapter {bad!r} (<path>) is refused on vLLM"
        )
        name = f"a{number}"
        server.load(name, adapters.good["a"])
        assert_exact(server, adapters, "a", name)
        server.unload(name)


def test_refused_replacement_leaves_adapter_unchanged(server: Server, adapters: Adapters) -> None:
    server.load("x", adapters.good["a"])
    before = server.complete("x", prompts(1)[0])
    for folder, message in adapters.bad.values():
        with pytest.raises(ServerError, match=message):
            server.load("x", folder, inplace=True)
        assert server.complete("x", prompts(1)[0]) == before
    server.load("x", adapters.good["b"], inplace=True)
    assert_exact(server, adapters, "b", "x")
    server.unload("x")


def test_inplace_loads_files_only_once(server: Server, adapters: Adapters, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters.good["a"], tmp_path / "moved")
    server.load("y", folder, inplace=True)
    shutil.rmtree(folder)
    assert_exact(server, adapters, "a", "y")
    server.unload("y")


def test_evicted_adapter_with_missing_or_changed_files_fails_alone(
    server: Server, adapters: Adapters, tmp_path: Path
) -> None:
    gone = shutil.copytree(adapters.good["a"], tmp_path / "gone")
    changed = shutil.copytree(adapters.good["a"], tmp_path / "changed")
    server.load("gone", gone)
    server.load("changed", changed)
    for name in "bcd":
        server.load(name, adapters.good[name])
    shutil.rmtree(gone)
    shutil.copytree(adapters.bad["cut_rows"][0], changed, dirs_exist_ok=True)
    for name in ("gone", "changed"):
        # The client sees the reason; vLLM's server replaces the path.
        with pytest.raises(ServerError, match=rf"400: LoRA adapter '{name}' \(<path>\) is refused"):
            server.complete(name, prompts(1)[0])
        for other in "bcd":
            assert_exact(server, adapters, other)
    log = server.log.read_text()
    assert "fails: LoRA adapter 'gone'" in log
    assert "fails: LoRA adapter 'changed'" in log


def test_short_soak_has_no_failures(server: Server, adapters: Adapters, tmp_path: Path) -> None:
    """``python3 ci/stress.py soak`` runs 500 steps of the same, and measures memory."""
    run = Soak(adapters.checkpoint, tmp_path)
    run.run(server, 20)
    assert run.counts["wrong"] == 0, run.counts
    assert min(run.counts["loads"], run.counts["refusals"], run.counts["requests"]) > 2


class TestStock:
    """Tests of stock vLLM's defects; a failure means that a later release of vLLM fixes the defect."""

    @pytest.fixture(scope="class")
    def stock(
        self, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("stock") / "log"
        with Server(
            adapters.checkpoint, log, *SLOTS, plugin=False, tensor_parallel_size=2
        ) as running:
            yield running

    def test_stock_vllm_serves_part_of_an_adapter(self, stock: Server, adapters: Adapters) -> None:
        folder, _ = adapters.bad["rename_layer"]
        stock.load("part", folder)
        answer = stock.complete("part", prompts(1)[0])
        assert not adapters.reference.compare("a", answer).is_exact

    def test_good_adapter_fails_after_refused_one(
        self, stock: Server, adapters: Adapters, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(adapters.good["b"], tmp_path / "b")
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 8', '"r": 64'))
        message = "LoRA rank 64 is greater than max_lora_rank 16"
        with pytest.raises(ServerError, match=message):
            stock.load("b", folder)
        # The other rank's answer to the first request is taken as the answer to this one.
        with pytest.raises(ServerError, match=message):
            stock.load("a", adapters.good["a"])

    def test_evicted_adapter_with_missing_files_ends_engine(
        self, stock: Server, adapters: Adapters, tmp_path: Path
    ) -> None:
        gone = shutil.copytree(adapters.good["a"], tmp_path / "gone")
        for name, folder in {"gone": gone, **{n: adapters.good[n] for n in "bcd"}}.items():
            stock.load(name, folder)
        shutil.rmtree(gone)
        with pytest.raises((ServerError, OSError)):
            stock.complete("gone", prompts(1)[0])
        assert "EngineCore encountered a fatal error" in stock.log.read_text()


def test_bad_adapter_on_command_line_stops_server(adapters: Adapters, tmp_path: Path) -> None:
    folder, message = adapters.bad["cut_rows"]
    arguments = ["--lora-modules", f"bad={folder}"]
    with (
        pytest.raises(ServerError) as error,
        Server(adapters.checkpoint, tmp_path / "log", *arguments, plugin=True),
    ):
        pass
    assert message in str(error.value)
    assert "ValueError: Call to add_lora method failed: LoRA adapter 'bad' (" in str(error.value)
