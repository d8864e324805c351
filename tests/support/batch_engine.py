"""An engine that serves several adapters in one batch, and engines with merged weights.

``python -m support.batch_engine JOB`` runs one engine with LoRA in this process, after an engine with merged
weights in a fork, and writes what differs.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from support import mixer_kernels, oracle_cases
from support.oracle_engines import FORCED, VOCABULARY, _load_again, call_in_fork, prepare
from support.oracle_families import FAMILIES
from support.oracle_family import save_checkpoint

DECODED = 5
#: Family -> adapter -> the ends of its modules' names; all have one rank and scale, and tensors of their own.
ADAPTERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "DeepSeek-V3": {
        "one kind": ("kv_b_proj",),
        "all linear": ("_proj", "_proj_with_mqa"),
        "one layer": ("layers.1.self_attn.kv_b_proj", "q_b_proj"),
    },
    "Mamba": {
        "one kind": ("x_proj",),
        "all linear": ("_proj",),
        "one layer": ("layers.1.mixer.x_proj", "layers.0.mixer.dt_proj"),
    },
}
#: The requests of a batch; None: no adapter.
BATCH = ("one kind", None, "all linear", "one layer", "one kind", "all linear", None)


def list_prompts() -> list[list[int]]:
    """Return the prompts of the batch: 17 to 59 tokens, the first 32 in common."""
    generator = torch.Generator().manual_seed(3)
    start, *rest = torch.randint(3, VOCABULARY, (len(BATCH) + 1, 32), generator=generator).tolist()
    return [(start + tail)[: 17 + 7 * number] for number, tail in enumerate(rest)]


def start(checkpoint: Path, job: Mapping[str, Any], **options: Any) -> Any:
    """Start an engine."""
    from vllm import LLM

    return LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=80,
        max_num_seqs=8,
        max_logprobs=VOCABULARY,
        num_gpu_blocks_override=128,
        seed=0,
        disable_log_stats=True,
        # vLLM's CPU kernel rotates other rows than its own, where queries and keys are views (0.32.0).
        compilation_config={"custom_ops": ["-rotary_embedding"]},
        enforce_eager=True,
        **job["options"],
        **options,
    )


def ask(llm: Any, requests: list[Any] | None = None) -> torch.Tensor:
    """Return the log-probabilities of the decoded tokens, ``(requests, DECODED, vocabulary)``.

    Those of the prompt would make vLLM prefill it again, without its cache.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=DECODED,
        min_tokens=DECODED,
        allowed_token_ids=[FORCED],
        temperature=0,
        detokenize=False,
        logprobs=VOCABULARY,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in list_prompts()]
    answers = llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    return torch.tensor(
        [
            [[step[token].logprob for token in range(VOCABULARY)] for step in a.outputs[0].logprobs]
            for a in answers
        ]
    )


def compute_expected(folder: Path, job: Mapping[str, Any]) -> dict[str | None, torch.Tensor]:
    """Return the answers of an engine without LoRA, to the whole batch, per adapter merged into it."""
    with mock.patch.dict("os.environ", VLLM_NWAY_LORA="0"):
        llm = start(folder / "model", {"options": {}})
    merged = folder / "merged"
    shutil.copytree(folder / "model", merged, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = list(oracle_cases.read_checkpoint(folder / "model"))
    answers: dict[str | None, torch.Tensor] = {None: ask(llm)}
    for name, modules in list_modules(folder, job["family"]).items():
        save_file(dict(oracle_cases.merge(weights, modules)), merged / "model.safetensors")
        llm.collective_rpc(_load_again, args=(str(merged),))
        answers[name] = ask(llm)
    return answers


def list_modules(folder: Path, family: str) -> dict[str, list[str]]:
    """Return each adapter's modules."""
    modules = [m for m in oracle_cases.list_modules(folder / "model") if "layers." in m]
    return {
        name: [m for m in modules if m.endswith(ends)] for name, ends in ADAPTERS[family].items()
    }


def use_chunks() -> None:
    """Allow chunked prefill and the prefix cache with MLA on CPU, which vLLM turns off."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(_: Any, vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.enable_chunked_prefill = True
        vllm_config.scheduler_config.max_num_batched_tokens = 24
        vllm_config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def count_calls() -> Counter[str]:
    """Return a counter of the corrections in this process that reach a token."""
    from vllm_nway_lora.layers import mla_calls
    from vllm_nway_lora.layers.mla_products import HeadLoRA

    counter: Counter[str] = Counter()

    def count(name: str, wrapped: Any) -> Any:
        @functools.wraps(wrapped)
        def call(self: Any, y: Any, x: Any, slots: torch.Tensor) -> None:
            counter[name] += int((slots >= 0).any())
            wrapped(self, y, x, slots)

        return call

    for name in ("add_to_keys_and_values", "add_to_queries", "add_to_output"):
        wrapped = getattr(HeadLoRA, name)
        setattr(HeadLoRA, name, count(name, wrapped))
    list_context = mla_calls.list_context

    def list_and_count(slots: torch.Tensor, prefill: Any) -> Iterator[torch.Tensor]:
        for chunk in list_context(slots, prefill):
            counter["context"] += int((chunk >= 0).any())
            yield chunk

    mla_calls.list_context = list_and_count
    return counter


def main(job: Mapping[str, Any]) -> int:
    """Run the engines of a job and write the differences.

    Args:
        job: ``family``, a key of :data:`ADAPTERS`; ``options`` of the engine with LoRA; ``chunks``, whether it prefills in chunks and with a
            cache, and gets the batch twice; ``results``, a file.
    """
    from vllm.lora.request import LoRARequest

    prepare()
    if job["family"] == "Mamba":
        mixer_kernels.replace_kernels()
    [family] = [family for family in FAMILIES if family.name == job["family"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(family, folder / "model")
        shapes = oracle_cases.list_modules(folder / "model")
        expected = call_in_fork(compute_expected, folder, job)
        if job["chunks"]:
            use_chunks()
        counter = mixer_kernels.count_parts() if family.name == "Mamba" else count_calls()
        llm = start(folder / "model", job, enable_lora=True, max_loras=4, max_lora_rank=8)
        requests: dict[str | None, Any] = {None: None}
        for number, (adapter, modules) in enumerate(list_modules(folder, family.name).items()):
            path = oracle_cases.save_adapter(folder / str(number), shapes, modules)
            requests[adapter] = LoRARequest(adapter, number + 1, str(path))
        batch = [requests[adapter] for adapter in BATCH]
        batches = [ask(llm, batch) for _ in range(1 + job["chunks"])]
        results = {
            "calls": dict(counter),
            "errors": [
                _distance(answers[i], expected[a][i])
                for answers in batches
                for i, a in enumerate(BATCH)
            ],
            "effects": [_distance(expected[a][i], expected[None][i]) for i, a in enumerate(BATCH)],
        }
    Path(job["results"]).write_text(json.dumps(results))
    return 0


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
