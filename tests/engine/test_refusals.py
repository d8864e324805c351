"""Refusals on real engines: the server goes on serving, exactly; stock vLLM does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import damage
from support.adapters import Reference, prompts, save_adapter
from support.checkpoints import save_qwen3_5
from support.server import Server, ServerError

MODULES = ("in_proj_qkv", "in_proj_z", "q_proj", "down_proj")

#: Fewer slots than adapters, so that loading one more evicts the one used longest ago.
SLOTS = ("--max-loras", "3", "--max-cpu-loras", "3")


class Adapters(NamedTuple):
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
        change.__name__: (damage.copy(good["a"], root / change.__name__, change), words)
        for change, words in damage.DAMAGES.items()
    }
    return Adapters(checkpoint, good, bad, Reference(checkpoint, good))


@pytest.fixture(scope="module")
def server(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(adapters.checkpoint, log, *SLOTS, plugin=True, tensor_parallel_size=2) as running:
        yield running


def assert_exact(server: Server, adapters: Adapters, name: str, served_as: str = "") -> None:
    answer = server.complete(served_as or name, prompts(1)[0])
    comparison = adapters.reference.compare(name, answer)
    assert comparison.exact, (name, comparison)


def test_a_refused_adapter_then_a_good_one(server: Server, adapters: Adapters) -> None:
    for number, (what, (folder, words)) in enumerate(adapters.bad.items()):
        with pytest.raises(ServerError) as error:
            server.load(what, folder)
        assert words in str(error.value)
        assert f"LoRA adapter {what!r} ({folder}) is refused on vLLM" in str(error.value)
        assert "rank" not in str(error.value).partition("is refused")[0]  # all ranks say the same
        name = f"a{number}"
        server.load(name, adapters.good["a"])
        assert_exact(server, adapters, "a", name)
        server.unload(name)


def test_a_bad_replacement_changes_nothing(server: Server, adapters: Adapters) -> None:
    server.load("x", adapters.good["a"])
    before = server.complete("x", prompts(1)[0])
    for folder, words in adapters.bad.values():
        with pytest.raises(ServerError, match=words):
            server.load("x", folder, inplace=True)
        assert server.complete("x", prompts(1)[0]) == before
    server.load("x", adapters.good["b"], inplace=True)
    assert_exact(server, adapters, "b", "x")
    server.unload("x")


def test_inplace_is_not_repeated_at_each_step(
    server: Server, adapters: Adapters, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters.good["a"], tmp_path / "moved")
    server.load("y", folder, inplace=True)
    shutil.rmtree(folder)
    assert_exact(server, adapters, "a", "y")
    server.unload("y")


def test_an_evicted_adapter_whose_files_are_gone(
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
        with pytest.raises(ServerError, match="500"):
            server.complete(name, prompts(1)[0])
        for other in "bcd":
            assert_exact(server, adapters, other)
    log = server.log.read_text()
    assert "fails: LoRA adapter 'gone'" in log
    assert "fails: LoRA adapter 'changed'" in log


class TestStock:
    """Each defect that the tests above would show; a failure says that upstream mended it."""

    @pytest.fixture(scope="class")
    def stock(
        self, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("stock") / "log"
        with Server(
            adapters.checkpoint, log, *SLOTS, plugin=False, tensor_parallel_size=2
        ) as running:
            yield running

    def test_it_serves_part_of_an_adapter(self, stock: Server, adapters: Adapters) -> None:
        folder, _ = adapters.bad["misname"]
        stock.load("part", folder)
        answer = stock.complete("part", prompts(1)[0])
        assert not adapters.reference.compare("a", answer).exact

    def test_a_refused_adapter_makes_the_next_good_one_fail(
        self, stock: Server, adapters: Adapters
    ) -> None:
        folder, _ = adapters.bad["drop_a"]
        with pytest.raises(ServerError, match="NoneType"):
            stock.load("bad", folder)
        with pytest.raises(ServerError, match="NoneType"):
            stock.load("a", adapters.good["a"])

    def test_an_evicted_adapter_whose_files_are_gone_ends_the_engine(
        self, stock: Server, adapters: Adapters, tmp_path: Path
    ) -> None:
        gone = shutil.copytree(adapters.good["a"], tmp_path / "gone")
        for name, folder in {"gone": gone, **{n: adapters.good[n] for n in "bcd"}}.items():
            stock.load(name, folder)
        shutil.rmtree(gone)
        with pytest.raises((ServerError, OSError)):
            stock.complete("gone", prompts(1)[0])
        assert "EngineCore encountered a fatal error" in stock.log.read_text()
