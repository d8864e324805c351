"""An engine with experts on CPU, without a server, with all adapters loaded at once.

The engine core runs in a child process of the test, and the workers are forked from it, so that they
have the kernels' replacement (``oracle_moe``). Layers, slots, loading and admission are vLLM's own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support import oracle_moe
from support.adapters import Answer
from support.processes import run_module
from support.server import engine_environment

NEW_TOKENS = 8
LIMIT = 1200  # seconds
BASE = ""  # the name of requests without an adapter


@dataclass(frozen=True)
class Setup:
    """How an engine is started.

    Attributes:
        tensor_parallel_size: 1 or 2.
        fully_sharded: ``--fully-sharded-loras``.
        expert_parallel: ``--enable-expert-parallel``.
    """

    tensor_parallel_size: int
    fully_sharded: bool
    expert_parallel: bool = False

    def __str__(self) -> str:
        sharded = "-sharded" * self.fully_sharded
        return f"tp{self.tensor_parallel_size}{sharded}{'-ep' * self.expert_parallel}"


@dataclass(frozen=True)
class Served:
    """An engine's answers; under :data:`BASE` those without an adapter.

    Attributes:
        refused: adapter -> the error with which it failed to load.
        alone: adapter -> an answer for each prompt.
        together: one batch of one request for each adapter and three without, one after each prompt:
            (adapter, answer).
        afterwards: the answers without an adapter, after all adapters are removed.
    """

    refused: dict[str, str]
    alone: dict[str, list[Answer]]
    together: list[tuple[str, Answer]]
    afterwards: list[Answer]


def serve(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    prompts: list[list[int]],
    log: Path,
    setup: Setup,
    plugin: bool = True,
) -> Served:
    """Start an engine in a child process and complete the prompts with each adapter.

    Raises:
        RuntimeError: the engine did not start or did not end; the message is the end of its log.
    """
    job = {
        "checkpoint": str(checkpoint),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "prompts": prompts,
        "setup": asdict(setup),
        "answers": str(log.with_suffix(".json")),
    }
    environment = engine_environment(plugin, setup.tensor_parallel_size) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A process that has run a parallel region cannot be forked (libgomp).
        "OMP_NUM_THREADS": "1",
    }
    run_module("support.moe_engine", job, log, environment, LIMIT)
    found = json.loads(Path(job["answers"]).read_text())
    return Served(
        found["refused"],
        {name: [Answer(**a) for a in answers] for name, answers in found["alone"].items()},
        [(name, Answer(**answer)) for name, answer in found["together"]],
        [Answer(**answer) for answer in found["afterwards"]],
    )


def main(job: dict[str, Any]) -> None:
    """Run the engine in this process and write the answers to ``job["answers"]``."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor import multiproc_executor

    # vLLM spawns workers on CPU; see support/offline.py.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    oracle_moe.replace_kernels()
    adapters, prompts = job["adapters"], job["prompts"]
    llm = _start(job["checkpoint"], Setup(**job["setup"]), len(adapters))
    requests: dict[str, Any] = {BASE: None}
    refused = {}
    for number, (name, folder) in enumerate(adapters.items(), start=1):
        request = LoRARequest(name, number, folder)
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
        else:
            requests[name] = request
    alone = {
        name: [_complete(llm, [prompt], [request])[0] for prompt in prompts]
        for name, request in requests.items()
    }
    # Requests without an adapter are first, in the middle and last.
    names = list(requests)
    batch = [BASE, *names[1 : len(names) // 2], BASE, *names[len(names) // 2 :], BASE]
    together = _complete(
        llm,
        [prompts[n % len(prompts)] for n in range(len(batch))],
        [requests[name] for name in batch],
        score_prompts=False,
    )
    for name in names[1:]:
        llm.llm_engine.remove_lora(requests[name].lora_int_id)
    afterwards = [_complete(llm, [prompt], [None])[0] for prompt in prompts]
    found = {
        "refused": refused,
        "alone": {name: list(map(asdict, answers)) for name, answers in alone.items()},
        "together": list(zip(batch, map(asdict, together), strict=True)),
        "afterwards": list(map(asdict, afterwards)),
    }
    Path(job["answers"]).write_text(json.dumps(found))
    os._exit(0)  # the parent process ends the workers, which are in this process's session


def _start(checkpoint: str, setup: Setup, adapters: int) -> Any:
    from vllm import LLM

    return LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        tensor_parallel_size=setup.tensor_parallel_size,
        enable_expert_parallel=setup.expert_parallel,
        enable_lora=True,
        # One slot stays free: to 0.32.0, tokens without LoRA get the last slot's adapter on CPU.
        max_loras=adapters + 1,
        max_lora_rank=16,
        fully_sharded_loras=setup.fully_sharded,
        limit_mm_per_prompt={"image": 0, "video": 0},
        enable_prefix_caching=False,
        max_model_len=128,
        max_num_seqs=16,
        # All prompts in one step.
        max_num_batched_tokens=512,
        disable_log_stats=True,
    )


def _complete(
    llm: Any, prompts: list[list[int]], requests: list[Any], score_prompts: bool = True
) -> list[Answer]:
    """Complete prompts greedily in one batch.

    With LoRA on CPU, 0.32.0 cannot score the prompts of a batch of several requests.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=NEW_TOKENS,
        temperature=0,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if score_prompts else None,
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = []
    for done, prompt in zip(
        llm.generate(inputs, sampling, lora_request=requests, use_tqdm=False), prompts, strict=True
    ):
        [completion] = done.outputs
        scored = [*(done.prompt_logprobs or [])[1:], *completion.logprobs]
        tokens = [*prompt, *completion.token_ids]
        logprobs = [
            p[t].logprob for p, t in zip(scored, tokens[len(tokens) - len(scored) :], strict=True)
        ]
        answers.append(Answer(tokens, logprobs, len(prompt)))
    return answers


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
