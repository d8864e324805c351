"""An engine without a server, for tests of many releases: vLLM is imported once instead of five times.

The engine core runs in the calling process, and the workers are forked from that process. Loader, LoRA
manager, workers, executor and warm-up are the release's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from support.adapters import Answer
from support.processes import run_module
from support.server import NEW_TOKENS, engine_environment

TIMEOUT = 1200  # seconds


def complete_with_adapters(
    checkpoint: Path,
    adapters: dict[str, Path],
    prompt: list[int],
    log: Path,
    *,
    plugin: bool,
    tensor_parallel_size: int = 2,
) -> dict[str, Answer | str]:
    """Start an engine in a child process and complete ``prompt`` greedily with each adapter in turn.

    The engine runs with ``fully_sharded_loras``.

    Returns:
        Per adapter, and under "" for the base model: the answer, or the text of the error with which
        the adapter failed to load.

    Raises:
        RuntimeError: the engine did not start or did not end; the message is the end of its log.
    """
    job = {
        "checkpoint": str(checkpoint),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "prompt": prompt,
        "tensor_parallel_size": tensor_parallel_size,
        "answers": str(log.with_suffix(".json")),
    }
    environment = engine_environment(plugin, tensor_parallel_size) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A process that has run a parallel region cannot be forked (libgomp).
        "OMP_NUM_THREADS": "1",
    }
    run_module("support.offline", job, log, environment, TIMEOUT)
    found = json.loads(Path(job["answers"]).read_text())
    return {
        name: answer if isinstance(answer, str) else Answer(**answer)
        for name, answer in found.items()
    }


def main(job: dict[str, Any]) -> None:
    """Run the engine in this process and write the answers to ``job["answers"]``."""
    import inspect
    import multiprocessing

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker import cpu_worker

    def get_mp_context() -> Any:
        # vLLM spawns workers on CPU. Forking is safe here: this process has used no device and no
        # thread that a fork would lose. 0.18's workers do not start unless LD_PRELOAD names two
        # libraries that only make them faster; workers of later releases print a warning
        # (vllm/v1/worker/cpu_worker.py, init_device).
        if "raise RuntimeError" in inspect.getsource(cpu_worker.CPUWorker.init_device):
            os.environ["LD_PRELOAD"] = "libtcmalloc libiomp"
        return multiprocessing.get_context("fork")

    multiproc_executor.get_mp_context = get_mp_context
    llm = LLM(
        job["checkpoint"],
        dtype="bfloat16",
        enforce_eager=True,
        tensor_parallel_size=job["tensor_parallel_size"],
        enable_lora=True,
        max_loras=8,
        max_lora_rank=16,
        fully_sharded_loras=True,
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=256,
    )
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=1
    )
    answers: dict[str, Any] = {}
    for number, (name, folder) in enumerate([*job["adapters"].items(), ("", None)], start=1):
        request = LoRARequest(name, number, folder) if folder else None
        if request:
            try:
                llm.llm_engine.add_lora(request)
            except Exception as error:
                answers[name] = f"{type(error).__name__}: {error}"
                continue
        [done] = llm.generate(
            [{"prompt_token_ids": job["prompt"]}], sampling, lora_request=request, use_tqdm=False
        )
        [completion] = done.outputs
        tokens = [*job["prompt"], *completion.token_ids]
        positions = [*done.prompt_logprobs, *completion.logprobs]
        answers[name] = {
            "tokens": tokens,
            "logprobs": [p[t].logprob for p, t in zip(positions[1:], tokens[1:])],
            "prompt_length": len(job["prompt"]),
        }
    Path(job["answers"]).write_text(json.dumps(answers))
    os._exit(0)  # the parent process ends the workers, which are in this process's session


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
