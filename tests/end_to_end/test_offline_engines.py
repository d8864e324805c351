"""Tests of refusals on engines without a server, and of the comparison of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import damage, rank_without_plugin
from support.adapters import ATTENTION, MLP, Answer, Reference, prompts, save_adapter
from support.checkpoints import save_llama
from support.processes import run_python
from support.server import Server, ServerError, engine_environment

from vllm_nway_lora import __version__

OFFLINE_ENGINE = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

checkpoint, bad, good, prompt, answers, options = json.loads(sys.argv[1])
llm = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, enable_lora=True, max_loras=3,
          max_lora_rank=16, max_model_len=128, max_num_seqs=4, **options)
results = {}
try:
    llm.llm_engine.add_lora(LoRARequest("bad", 1, bad))
except Exception as error:
    results["add_lora"] = str(error)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
results["added"] = llm.llm_engine.add_lora(LoRARequest("good", 2, good))
results["loaded"] = sorted(llm.llm_engine.list_loras())
# On CPU, vLLM 0.32.0 ends at its first step with pipeline parallelism, with LoRA and without.
can_step = "pipeline_parallel_size" not in options
prompts = [{"prompt_token_ids": prompt}]
requests = {"bad": LoRARequest("bad", 1, bad), "good": LoRARequest("good", 2, good)}
calls = {"bad": ["bad"], "good and bad": ["good", "bad"], "good": ["good"]}
for name, adapters in calls.items():
    if not can_step and name != "bad":
        continue
    try:
        request, *_ = llm.generate(
            prompts * len(adapters), greedy, lora_request=[requests[a] for a in adapters]
        )
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
        continue
    output = request.outputs[0]
    results[name] = [
        output.finish_reason,
        list(output.token_ids),
        [step[token].logprob for token, step in zip(output.token_ids, output.logprobs or [])],
    ]
Path(answers).write_text(json.dumps(results))
"""


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        # Only the last pipeline rank has the bad adapter's layer, so only it raises an error.
        ({"pipeline_parallel_size": 2}, "On rank 0 of 2: no error. On rank 1 of 2: "),
        ({"tensor_parallel_size": 2, "fully_sharded_loras": True}, ""),
    ],
    ids=["pp2", "tp2-sharded"],
)
def test_offline_engine_refuses_bad_adapter_and_serves_good_one(
    tmp_path: Path, options: dict[str, Any], ranks: str
) -> None:
    """The model is a Llama. The adapters are on all of its linear layers, all of vLLM's own classes."""
    checkpoint = save_llama(tmp_path / "model")
    good = save_adapter(checkpoint, tmp_path / "good", ATTENTION + MLP, seed=0)
    bad = damage.copy_adapter(good, tmp_path / "bad", damage.cut_rows)
    prompt, answers = prompts(1)[0], tmp_path / "answers"
    paths = map(str, (checkpoint, bad, good))
    arguments = json.dumps([*paths, prompt, str(answers), options])
    done = run_python(OFFLINE_ENGINE, arguments, **engine_environment(True, 2))
    assert done.returncode == 0, done.stderr
    results = json.loads(answers.read_text())
    assert f"{ranks}LoRA adapter 'bad' ({bad}) is refused on vLLM" in results["add_lora"]
    assert (
        "module model.layers.3.self_attn.v_proj (layer model.layers.3.self_attn.qkv_proj, "
        in results["add_lora"]
    )
    assert results["added"]
    assert results["loaded"] == [2]
    refusal = f"AdapterError: {ranks}LoRA adapter 'bad' ({bad}) is refused on vLLM"
    assert results["bad"].startswith(refusal)
    if "pipeline_parallel_size" in options:
        return
    assert results["good and bad"].startswith(refusal)
    _, tokens, logprobs = results["good"]
    answer = Answer(prompt + tokens, logprobs, len(prompt))
    comparison = Reference(checkpoint, {"good": good}).compare("good", answer)
    assert comparison.is_exact, comparison


def test_server_does_not_start_with_a_rank_without_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine core is spawned, as always under ``vllm serve``."""
    checkpoint = save_llama(tmp_path / "model")
    monkeypatch.setenv(rank_without_plugin.VARIABLE, "1")
    log = tmp_path / "log"
    with (
        pytest.raises(ServerError),
        Server(checkpoint, log, plugin=True, tensor_parallel_size=2),
    ):
        pass
    text = log.read_text()
    assert "RankError: vllm-nway-lora differs between the processes of this engine" in text
    assert f"rank 0: {__version__} (VLLM_NWAY_LORA=1; patches: " in text
    assert "rank 1: not loaded" in text
