"""One engine without a server that runs the steps of a job: ``python -m support.scale_offline JOB``.

Under torchrun, each rank runs the same job. Ranks other than 0 write no answers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.adapters import Answer
from support.processes import run_module
from support.scale import NEW_TOKENS
from support.server import engine_environment

LIMIT = 400  # seconds

Results = list[Any]


def run_steps(
    checkpoint: Path,
    steps: Sequence[Sequence[Any]],
    log: Path,
    options: Mapping[str, Any],
    *,
    plugin: bool = True,
    ranks: int = 1,
    torchrun: bool = False,
    **environment: str,
) -> Results:
    """Start an engine in a child process and run the steps; return one result per step.

    A step is the name of a method of :class:`Engine` and its arguments. Its result is what the method
    returns (answers as :class:`Answer`), or the text of its error.

    Raises:
        RuntimeError: the engine did not start or did not end; the message is the end of its log.
    """
    out = log.with_suffix(".json")
    job = {"checkpoint": str(checkpoint), "steps": steps, "options": options, "out": str(out)}
    variables = engine_environment(plugin, ranks) | {"OMP_NUM_THREADS": "1", **environment}
    if extra := environment.get("PYTHONPATH"):
        own = engine_environment(plugin, ranks)["PYTHONPATH"]
        variables["PYTHONPATH"] = os.pathsep.join((own, extra))
    if torchrun:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        run_module("support.scale_torchrun", job | {"ranks": ranks}, log, variables, LIMIT)
    else:
        run_module("support.scale_offline", job, log, variables, LIMIT)
    return [
        Answer(**result) if isinstance(result, dict) and "tokens" in result else result
        for result in json.loads(out.read_text())
    ]


class Engine:
    """An engine, and the steps that a job can ask for."""

    def __init__(self, checkpoint: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        if options.get("distributed_executor_backend") == "ray":
            from support.scale_ray import CpuRayExecutor

            options["distributed_executor_backend"] = CpuRayExecutor
        defaults = {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "enable_lora": True,
            "max_loras": 4,
            "max_lora_rank": 16,
            "max_model_len": 256,
            "max_num_seqs": 4,
        }
        self.llm = LLM(checkpoint, **defaults | options)
        self._numbers: dict[str, int] = {}

    def add(self, name: str, folder: str, inplace: bool = False) -> bool:
        """Add an adapter, or replace the one of that name."""
        return bool(self.llm.llm_engine.add_lora(self._request(name, folder, inplace)))

    def remove(self, name: str) -> bool:
        """Remove an adapter."""
        return bool(self.llm.llm_engine.remove_lora(self._numbers[name]))

    def complete(
        self, name: str | None, folder: str | None, prompt: list[int], new_tokens: int = NEW_TOKENS
    ) -> dict[str, Any]:
        """Complete ``prompt`` greedily with an adapter, or with the base model."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=0, detokenize=False
        )
        request = self._request(name, folder) if name and folder else None
        [done] = self.llm.generate(
            [{"prompt_token_ids": prompt}], sampling, lora_request=request, use_tqdm=False
        )
        [output] = done.outputs
        self._cached = done.num_cached_tokens
        return {
            "tokens": [*prompt, *output.token_ids],
            "logprobs": [step[t].logprob for t, step in zip(output.token_ids, output.logprobs)],
            "prompt_length": len(prompt),
        }

    def cached(self) -> int | None:
        """Return how many tokens of the last prompt were in the prefix cache."""
        return self._cached

    def sleep(self, level: int) -> None:
        """Put the engine to sleep."""
        self.llm.sleep(level)

    def wake_up(self) -> None:
        """Wake the engine up."""
        self.llm.wake_up()

    def lose(self, what: str) -> list[int]:
        """Overwrite tensors of each worker with NaN, as sleep of level 2 loses them on a GPU."""
        return list(self.llm.collective_rpc(_lose, args=(what,)))

    def reload(self, folder: str | None) -> None:
        """Reload the base model's weights from its folder, or from another."""
        options = {"weights_path": folder} if folder else {}
        self.llm.collective_rpc("reload_weights", kwargs=options)
        self.llm.reset_prefix_cache()

    def update(self, folder: str) -> None:
        """Update the base model's weights from another folder (``scale_weights``), as a trainer does."""
        self.llm.collective_rpc("start_weight_update")
        self.llm.collective_rpc("update_weights", args=({"folder": folder},))
        self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache()

    def drafted(self) -> int:
        """Return how many of the tokens that the drafter proposed were accepted."""
        found = [m for m in self.llm.get_metrics() if m.name.endswith("num_accepted_tokens")]
        return int(sum(metric.value for metric in found))

    def overwrite(self, source: str, target: str) -> None:
        """Replace an adapter's files, as a trainer does that saves to one folder."""
        shutil.copytree(source, target, dirs_exist_ok=True)

    def _request(self, name: str, folder: str, inplace: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return LoRARequest(name, number, folder, load_inplace=inplace)


def _lose(worker: Any, what: str) -> int:
    """Overwrite the parameters or the LoRA slots with NaN; return how many tensors."""
    import torch

    count = 0
    model = worker.model_runner.model
    tensors = list(model.parameters()) if what == "parameters" else []
    for module in model.modules() if what == "slots" else ():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            held = getattr(module, name, ())
            tensors += [held] if isinstance(held, torch.Tensor) else list(held)
    for tensor in tensors:
        tensor.data.fill_(float("nan"))
        count += 1
    return count


def main(job: dict[str, Any]) -> None:
    """Run the job's steps and write their results."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    engine = Engine(job["checkpoint"], job["options"])
    results: Results = []
    for name, *arguments in job["steps"]:
        try:
            results.append(getattr(engine, name)(*arguments))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    if os.environ.get("RANK", "0") == "0":
        Path(job["out"]).write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # the parent process ends the workers, which are in this process's session


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
