"""Refusals on real engines: the server goes on serving, exactly; stock vLLM does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import damage
from support.adapters import ATTENTION, MLP, Answer, Reference, prompts, save_adapter
from support.checkpoints import save_llama, save_qwen3_5
from support.foretold import foretell
from support.processes import run_python
from support.server import Server, ServerError, engine_environment
from support.stress import Soak

from vllm_nway_lora import __version__

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
    """And ``check`` has said so, but for a NaN: it reads no values."""
    folders = adapters.good | {what: folder for what, (folder, _) in adapters.bad.items()}
    expected = {name: "refused" if name in adapters.bad else "exact" for name in folders}
    foretold = foretell(adapters.checkpoint, folders, plugin=True, tensor_parallel_size=2)
    assert foretold == expected | {damage.poison.__name__: "exact"}
    for number, (what, (folder, words)) in enumerate(adapters.bad.items()):
        with pytest.raises(ServerError) as error:
            server.load(what, folder)
        assert words in str(error.value)
        # vLLM's server takes paths out of what it answers; all ranks say the same, so it is said once.
        assert str(error.value).startswith(
            f"500: Call to add_lora method failed: LoRA adapter {what!r} (<path>) is refused on vLLM"
        )
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


def test_a_short_soak(server: Server, adapters: Adapters, tmp_path: Path) -> None:
    """``python3 ci/stress.py soak`` does the same for 500 steps, and looks at memory."""
    run = Soak(adapters.checkpoint, tmp_path)
    run.run(server, 20)
    assert run.counts["wrong"] == 0, run.counts
    assert min(run.counts["loads"], run.counts["refusals"], run.counts["requests"]) > 2


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
        self, stock: Server, adapters: Adapters, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(adapters.good["b"], tmp_path / "b")
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 8', '"r": 64'))
        words = "LoRA rank 64 is greater than max_lora_rank 16"
        with pytest.raises(ServerError, match=words):
            stock.load("b", folder)
        with pytest.raises(ServerError, match=words):  # the other rank's answer of before
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


OFFLINE = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

checkpoint, bad, good, prompt, answers, options = json.loads(sys.argv[1])
llm = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, enable_lora=True, max_loras=3,
          max_lora_rank=16, max_model_len=128, max_num_seqs=4, **options)
said = {}
try:
    llm.llm_engine.add_lora(LoRARequest("bad", 1, bad))
except Exception as error:
    said["add_lora"] = str(error)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
said["added"] = llm.llm_engine.add_lora(LoRARequest("good", 2, good))
said["held"] = sorted(llm.llm_engine.list_loras())
# On CPU, vLLM 0.32.0 ends at its first step under pipeline parallelism, with LoRA and without.
steps = "pipeline_parallel_size" not in options
for name, number, path in [("bad", 1, bad), ("good", 2, good)][: 1 + steps]:
    [request] = llm.generate(
        {"prompt_token_ids": prompt}, greedy, lora_request=LoRARequest(name, number, path)
    )
    output = request.outputs[0]
    said[name] = [
        output.finish_reason,
        list(output.token_ids),
        [step[token].logprob for token, step in zip(output.token_ids, output.logprobs or [])],
    ]
Path(answers).write_text(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        # The first pipeline rank has no fault to find: the last one has the layer.
        ({"pipeline_parallel_size": 2}, "On rank 0 of 2: no error. On rank 1 of 2: "),
        ({"tensor_parallel_size": 2, "fully_sharded_loras": True}, ""),
    ],
    ids=["pp2", "tp2-sharded"],
)
def test_offline_engines(tmp_path: Path, options: dict[str, Any], ranks: str) -> None:
    """A Llama, all of whose linear layers the adapter has; vLLM's own classes serve them all."""
    checkpoint = save_llama(tmp_path / "model")
    good = save_adapter(checkpoint, tmp_path / "good", ATTENTION + MLP, seed=0)
    bad = damage.copy(good, tmp_path / "bad", damage.cut_rows)
    prompt, answers = prompts(1)[0], tmp_path / "answers"
    paths = map(str, (checkpoint, bad, good))
    arguments = json.dumps([*paths, prompt, str(answers), options])
    done = run_python(OFFLINE, arguments, **engine_environment(True, 2))
    assert done.returncode == 0, done.stderr
    said = json.loads(answers.read_text())
    assert f"{ranks}LoRA adapter 'bad' ({bad}) is refused on vLLM" in said["add_lora"]
    assert (
        "module model.layers.3.self_attn.v_proj (layer model.layers.3.self_attn.qkv_proj, "
        in (said["add_lora"])
    )
    assert said["added"]
    assert said["held"] == [2]
    assert said["bad"] == ["error", [], []]
    if "pipeline_parallel_size" in options:
        return
    _, tokens, logprobs = said["good"]
    answer = Answer(prompt + tokens, logprobs, len(prompt))
    comparison = Reference(checkpoint, {"good": good}).compare("good", answer)
    assert comparison.exact, comparison


def test_a_bad_adapter_on_the_command_line(adapters: Adapters, tmp_path: Path) -> None:
    folder, words = adapters.bad["cut_rows"]
    arguments = ["--lora-modules", f"bad={folder}"]
    with (
        pytest.raises(ServerError) as error,
        Server(adapters.checkpoint, tmp_path / "log", *arguments, plugin=True),
    ):
        pass
    assert words in str(error.value)
    assert "ValueError: Call to add_lora method failed: LoRA adapter 'bad' (" in str(error.value)


DIFFERING = """
import os, sys
from vllm import LLM
from vllm.v1.executor.multiproc_executor import WorkerProc

def make_worker_process(*args, _original=WorkerProc.make_worker_process, **kwargs):
    # A rank on whose node the plugin is not installed, or not let through.
    os.environ["VLLM_PLUGINS"] = "nway_lora" if kwargs["rank"] == 0 else "no_such_plugin"
    return _original(*args, **kwargs)

WorkerProc.make_worker_process = make_worker_process
os.environ["VLLM_PLUGINS"] = "nway_lora"
LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, enable_lora=True, max_model_len=128,
    max_num_seqs=4, tensor_parallel_size=2)
print("no difference was found")
"""


def test_a_rank_without_the_plugin_is_named_at_start(adapters: Adapters) -> None:
    environment = engine_environment(True, 2) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Else the workers are forked from a process that has the plugin already.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    done = run_python(DIFFERING, str(adapters.checkpoint), **environment)
    assert "no difference was found" not in done.stdout
    assert done.returncode != 0
    assert "RankError: vllm-nway-lora differs between the processes of this engine" in done.stderr
    assert f"rank 0: {__version__} (VLLM_NWAY_LORA=1; patches: " in done.stderr
    assert "rank 1: not loaded" in done.stderr
