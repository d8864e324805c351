"""What every executor must do: refuse a bad adapter, and serve good ones exactly before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from support.adapters import Answer, prompts
from support.scale import Served
from support.scale_offline import run_steps


class Executor(NamedTuple):
    """An executor of vLLM's by name, its ranks, and variables for its processes."""

    backend: str
    ranks: int
    environment: dict[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of ``LLM``."""
        return {
            "distributed_executor_backend": self.backend,
            "tensor_parallel_size": self.ranks,
            "fully_sharded_loras": self.ranks > 1,
        }


def check_executor(served: Served, log: Path, executor: Executor, **environment: str) -> None:
    """Check that a bad adapter is refused and that good ones are exact before and after it."""
    prompt = prompts(1)[0]
    a, b = str(served.good["a0"]), str(served.good["a1"])
    steps = [
        ("add", "a", a),
        ("complete", "a", a, prompt),
        ("add", "bad", str(served.bad[0])),
        ("add", "a", str(served.bad[0]), True),
        ("complete", "a", a, prompt),
        ("add", "b", b),
        ("complete", "b", b, prompt),
        ("add", "a", b, True),
        ("complete", "a", b, prompt),
        ("complete", None, None, prompt),
    ]
    results = run_steps(
        served.checkpoint,
        steps,
        log,
        executor.options,
        ranks=executor.ranks,
        torchrun=executor.backend == "external_launcher",
        **executor.environment,
        **environment,
    )
    assert results[0] is results[5] is results[7] is True, results
    assert all("is refused on vLLM" in result for result in results[2:4]), results
    answers = {1: "a0", 4: "a0", 6: "a1", 8: "a1", 9: None}
    for number, adapter in answers.items():
        answer = results[number]
        assert isinstance(answer, Answer), results
        assert served.judge.is_exact(adapter, answer), (number, answer)
