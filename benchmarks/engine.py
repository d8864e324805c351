"""Measure three servers on CPU: without LoRA, stock vLLM with LoRA, and the plugin with LoRA.

The model is a random Qwen3.5 of some hundred MB, whose adapters stock vLLM serves too. The three
servers run at the same time. Each round sends every load to each server in turn, so that other work
on the machine affects all three. If LoRA is on every projection, most LoRA layers are vLLM's own in
both servers. Those layers cost each token the same even if the adapter leaves them out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from machine import describe, write
from support.adapters import QWEN3_5, save_adapter
from support.checkpoints import VOCAB_SIZE, save_qwen3_5
from support.server import Server

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
#: Projections with LoRA -> the adapter's modules, and the servers' arguments that select them.
CONFIGURATIONS = {
    "in_proj_qkvz alone": (QWEN3_5["qkv+z"], ("--lora-target-modules", *QWEN3_5["qkv+z"])),
    "every projection": (QWEN3_5["all"], ()),
}
ARGUMENTS = ("--max-model-len", "512", "--no-enable-prefix-caching")


@dataclass(frozen=True)
class Load:
    """Requests sent at the same time.

    Attributes:
        requests: number of requests.
        prompt: tokens of each prompt.
        new: tokens to generate for each request.
    """

    requests: int
    prompt: int
    new: int

    def measure_seconds(self, server: Server, model: str) -> float:
        """Send the requests and wait for all answers; return the seconds that this takes."""
        prompts = [
            random.choices(range(3, VOCAB_SIZE), k=self.prompt) for _ in range(self.requests)
        ]
        with ThreadPoolExecutor(self.requests) as pool:
            started = time.perf_counter()
            answers = [
                pool.submit(server.complete, model, p, score_prompt=False, new_tokens=self.new)
                for p in prompts
            ]
            for answer in answers:
                answer.result()
            return time.perf_counter() - started


LOADS = {
    "prefill, 4 requests of 400 tokens": Load(4, 400, 1),
    "decode, 8 requests of 32 new tokens": Load(8, 16, 32),
    "decode, 1 request of 32 new tokens": Load(1, 16, 32),
}


def main() -> int:
    """Measure and save ``engine.json``; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", nargs="*", default=["base", "stock", "plugin"])
    parser.add_argument("--configurations", nargs="*", default=[*CONFIGURATIONS])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    machine = describe()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_qwen3_5(Path(folder) / "model", **SIZES)
        for name in arguments.configurations:
            for found in measure(name, checkpoint, arguments.servers, arguments.rounds):
                print(json.dumps(found), flush=True)
                rows.append(found)
    write(
        arguments.results / "engine.json",
        {"machine": machine | {"rounds": arguments.rounds}, "model": SIZES, "rows": rows},
    )
    return 0


def measure(
    configuration: str, checkpoint: Path, names: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Start the servers, send every load to each server in turn and return one row per load."""
    modules, restriction = CONFIGURATIONS[configuration]
    root = checkpoint.parent / configuration.replace(" ", "-")
    adapter = save_adapter(checkpoint, root / "adapter", modules, 0)
    seconds: dict[str, dict[str, list[float]]] = {load: {n: [] for n in names} for load in LOADS}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in names:
            lora = ("--no-enable-lora",) if name == "base" else restriction
            servers[name] = stack.enter_context(
                Server(checkpoint, root / f"{name}.log", *ARGUMENTS, *lora, plugin=name == "plugin")
            )
            if name != "base":
                servers[name].load("adapter", adapter)
        for number in range(rounds + 1):  # the first round warms up
            for load_name, load in LOADS.items():
                for name, server in servers.items():
                    model = str(checkpoint) if name == "base" else "adapter"
                    taken = load.measure_seconds(server, model)
                    if number:
                        seconds[load_name][name].append(taken)
    return [row(configuration, load, taken) for load, taken in seconds.items()]


def row(configuration: str, load_name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians of tokens per second, milliseconds per step and stock's time / the plugin's."""
    load = LOADS[load_name]
    tokens = load.requests * (load.prompt if load.new == 1 else load.new)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    found: dict[str, Any] = {
        "lora_on": configuration,
        "load": load_name,
        "tokens_per_second": {name: round(tokens / taken, 1) for name, taken in medians.items()},
        # A load has as many steps as each request has new tokens. The first step is the prefill.
        "ms_per_step": {name: round(taken / load.new * 1e3, 2) for name, taken in medians.items()},
    }
    if {"stock", "plugin"} <= seconds.keys():
        pairs = zip(seconds["stock"], seconds["plugin"], strict=True)
        found["speedup"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


if __name__ == "__main__":
    sys.exit(main())
