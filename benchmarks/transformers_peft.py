"""Measure LoRA of transformers with PEFT on CPU: the same model, adapters and loads as ``engine.py``.

The two sides, without LoRA and with it, take turns in one process of one thread. A time is processor time.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch
from engine import LOADS, MAX_LORAS, SIZES, Load, parse_arguments, save
from machine import describe, write

Forward = Callable[..., Any]


def load_sides(checkpoint: Path, adapters: list[Path]) -> tuple[Forward, Any]:
    """Return the model without LoRA, and a second one with every adapter, all in bfloat16."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        for _ in range(2)
    ]
    adapted = PeftModel.from_pretrained(models[1], adapters[0], adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        adapted.load_adapter(adapter, adapter_name=adapter.name)
    return models[0], adapted.to(torch.bfloat16).eval()


def measure(forward: Forward, load: Load, names: list[str]) -> float:
    """Return the processor time of one step, in seconds.

    Args:
        forward: the model.
        load: the requests.
        names: the adapter of each request in a batch of several, else nothing.
    """
    given: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    if len({*names}) > 1:
        given["adapter_names"] = names
    shape = (load.requests, load.prompt)
    tokens = torch.tensor(random.choices(range(3, 500), k=shape[0] * shape[1])).view(shape)
    started = time.process_time()
    output = forward(tokens, **given)
    if load.new == 1:
        return time.process_time() - started
    started = time.process_time()
    for _ in range(load.new - 1):
        tokens = output.logits[:, -1:].argmax(-1)
        output = forward(tokens, past_key_values=output.past_key_values, **given)
    return (time.process_time() - started) / (load.new - 1)


def main() -> int:
    """Measure and save ``transformers_peft.json``; return 0."""
    import peft
    import transformers

    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    machine = describe() | versions | {"threads": 1, "clock": "processor"}
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint, adapters = save(Path(folder))
        base, adapted = load_sides(checkpoint, adapters)
        for number in range(arguments.rounds + 1):  # the first round warms up
            for name, load in LOADS.items():
                for in_use in arguments.adapters:
                    names = [adapters[n % in_use].name for n in range(load.requests)]
                    adapted.set_adapter(names[0])
                    pair = measure(base, load, []), measure(adapted, load, names)
                    if number:
                        seconds.setdefault((name, in_use), []).append(pair)
            rows = [row(load, in_use, pairs) for (load, in_use), pairs in seconds.items()]
            result = {"machine": machine | {"rounds": number}, "model": SIZES, "loaded": MAX_LORAS}
            # Save after each round, so that an interrupted run keeps its results.
            write(arguments.results / "transformers_peft.json", result | {"rows": rows})
            print(json.dumps(rows), flush=True)
    return 0


def row(load: str, adapters: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the medians of milliseconds per step, and of the ratios of each round."""
    sides = {"base": [base for base, _ in pairs], "PEFT": [lora for _, lora in pairs]}
    return {
        "load": load,
        "adapters": adapters,
        "ms": {name: round(statistics.median(found) * 1e3, 2) for name, found in sides.items()},
        "of_base": {"PEFT": round(statistics.median(base / lora for base, lora in pairs), 3)},
    }


if __name__ == "__main__":
    sys.exit(main())
