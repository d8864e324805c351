"""Measure three engines on CPU: without LoRA, stock vLLM with LoRA, and the plugin with LoRA.

The model is a random Qwen3.5 of some hundred MB with LoRA on every projection. Each engine is a process
of one thread that runs vLLM's engine core in its own process. Each round sends every load to each engine in
turn. A time is the processor time of the engine's process, so that other work on the machine does not
count; it still disturbs the caches, so only ratios within a round are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from machine import describe, set_engine_environment, write

#: Nine gated-delta-net layers and three of attention, 180 million parameters.
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
    "num_attention_heads": 8,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "initializer_range": 0.02,
}
NAMES = ("base", "stock", "plugin")
MAX_LORAS = 16
RANK = 16


@dataclass(frozen=True)
class Load:
    """Requests that arrive together.

    Attributes:
        requests: number of requests.
        prompt: tokens of each prompt.
        new: tokens to generate for each request. With 1, the steps of the prompts are measured, else
            those after every prompt has been read.
    """

    requests: int
    prompt: int
    new: int


LOADS = {
    "prefill, 4 prompts of 256 tokens": Load(4, 256, 1),
    "decode of 8": Load(8, 16, 24),
    "decode of 1": Load(1, 16, 24),
}


class Engine:
    """An engine in a child process, inside a ``with`` block."""

    def __init__(self, name: str, checkpoint: Path, adapters: list[Path]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, checkpoint, adapters))

    def __enter__(self) -> Engine:
        self._process.start()
        self._pipe.recv()  # it is ready
        return self

    def measure(self, load: Load, adapters: int) -> float:
        """Return the processor time of one step, in seconds.

        Args:
            load: the requests.
            adapters: number of adapters that take turns.
        """
        self._pipe.send((asdict(load), adapters))
        return float(self._pipe.recv())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def serve(pipe: Connection, name: str, checkpoint: Path, adapters: list[Path]) -> None:
    """Run an engine in this process, and answer each load with its time."""
    set_engine_environment(plugin=name == "plugin")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {} if name == "base" else {"enable_lora": True, "max_loras": MAX_LORAS}
    engine = LLM(
        str(checkpoint),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=16,
        enable_prefix_caching=False,
        **lora,
    ).llm_engine
    requests = [None if name == "base" else LoRARequest(a.name, n, str(a)) for n, a in
                enumerate(adapters, start=1)]  # fmt: skip
    for request in filter(None, requests):
        engine.add_lora(request)
    number = 0
    pipe.send(None)
    while True:
        given, in_use = pipe.recv()
        load = Load(**given)
        sampling = SamplingParams(max_tokens=load.new, temperature=0, ignore_eos=True)
        started = time.process_time()
        waiting = set()
        for place in range(load.requests):
            number += 1
            waiting.add(str(number))
            prompt = {"prompt_token_ids": random.choices(range(3, 500), k=load.prompt)}
            request = requests[(number if load.requests == 1 else place) % in_use]
            engine.add_request(str(number), prompt, sampling, lora_request=request)
        steps = 0
        while engine.has_unfinished_requests():
            if not waiting and load.new > 1 and not steps:
                started = time.process_time()  # every prompt has been read
            steps += not waiting
            waiting -= {output.request_id for output in engine.step()}
        pipe.send((time.process_time() - started) / max(steps, 1))


def parse_arguments(description: str) -> argparse.Namespace:
    """Return the options of a benchmark that takes this module's loads."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> int:
    """Measure and save ``engine.json``; return 0."""
    arguments = parse_arguments(__doc__)
    machine = describe() | {"threads": 1, "clock": "processor"}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        checkpoint, adapters = save(Path(folder))
        engines = {name: stack.enter_context(Engine(name, checkpoint, adapters)) for name in NAMES}
        seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
        for number in range(arguments.rounds + 1):  # the first round warms up
            for key, name, taken in measure(engines, arguments.adapters):
                if number:
                    seconds.setdefault(key, {}).setdefault(name, []).append(taken)
            rows = [row(load, adapters, found) for (load, adapters), found in seconds.items()]
            # Save after each round, so that an interrupted run keeps its results.
            result = {"machine": machine | {"rounds": number}, "model": SIZES, "rank": RANK}
            write(arguments.results / "engine.json", result | {"rows": rows})
            print(json.dumps(rows), flush=True)
    return 0


def save(folder: Path) -> tuple[Path, list[Path]]:
    """Save the checkpoint and the adapters."""
    from support.adapters import QWEN3_5, save_adapter
    from support.checkpoints import save_qwen3_5

    checkpoint = save_qwen3_5(folder / "model", **SIZES)
    adapters = [
        save_adapter(checkpoint, folder / f"adapter-{number}", QWEN3_5["all"], number)
        for number in range(MAX_LORAS)
    ]
    return checkpoint, adapters


def measure(
    engines: dict[str, Engine], adapters: list[int]
) -> Iterator[tuple[tuple[str, int], str, float]]:
    """Send every load to each engine in turn; yield (load, adapters), engine and seconds per step."""
    for name, load in LOADS.items():
        for in_use in adapters:
            for engine in engines:
                yield (name, in_use), engine, engines[engine].measure(load, in_use)


def row(load: str, adapters: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians of milliseconds per step and of the ratios of each round."""

    def ratio(numerator: str, denominator: str) -> float:
        pairs = zip(seconds[numerator], seconds[denominator], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "load": load,
        "adapters": adapters,
        "ms": {n: round(statistics.median(s) * 1e3, 2) for n, s in seconds.items()},
        "of_base": {name: ratio("base", name) for name in NAMES[1:]},
        "speedup": ratio("stock", "plugin"),
    }


if __name__ == "__main__":
    sys.exit(main())
