"""Long tests of admission, run by ``python3 ci/stress.py``; the test suites run a few steps of them.

In the results, ``wrong`` counts the failures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from support import damage, manager, tiny
from support.adapters import Reference, prompts, save_adapter
from support.checkpoints import save_qwen3_5
from support.ranks import Ranks
from support.server import Server, ServerError

MODULES = ("in_proj_qkv", "in_proj_z", "q_proj", "down_proj")


def run_mutations(count: int, tensor_parallel_size: int, seed: int) -> dict[str, Any]:
    """Add ``count`` mutated adapters to vLLM's LoRA manager; return the counts of the results."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed

    from support import mutations

    counts: Counter[str] = Counter(tried=0, exact=0, refused=0, wrong=0)
    wrong: list[str] = []
    ranks = Ranks(tensor_parallel_size)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        resident = tiny.save(root / "resident", tiny.tensors(99))
        ranks.run(manager.start)

        @with_seed(seed)
        @given(adapter=mutations.adapters())
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(adapter: mutations.Adapter) -> None:
            attempts = ranks.run(manager.attempt, adapter.save(root / "mutant"), resident)
            refused_by_plugin = all(
                "AdapterError: LoRA adapter 'mutant'" in a.error for a in attempts if a.error
            )
            counts["tried"] += 1
            if not refused_by_plugin or not all(attempt.good for attempt in attempts):
                counts["wrong"] += 1
                wrong.append(f"{adapter}: {attempts}")
            elif any(attempt.error for attempt in attempts):
                counts["refused"] += 1
            else:
                counts["exact"] += 1
            if counts["tried"] % 1000 == 0:
                print(dict(counts), flush=True)

        try:
            run()
        finally:
            ranks.close()
    for line in wrong[:5]:
        print(line[:2000])
    return {
        "tensor_parallel_size": tensor_parallel_size,
        **counts,
        "seconds": round(time.monotonic() - started),
    }


class Soak:
    """Random loads, unloads, refusals and requests on one server; answers are compared with PEFT's."""

    def __init__(self, checkpoint: Path, root: Path) -> None:
        self.good = {
            name: save_adapter(checkpoint, root / name, MODULES, seed)
            for seed, name in enumerate("abcd")
        }
        self.bad = [
            damage.copy_adapter(folder, root / f"{name}-{change.__name__}", change)
            for name, folder in self.good.items()
            for change in damage.DAMAGES
        ]
        self.reference = Reference(checkpoint, self.good)
        self.counts: Counter[str] = Counter(
            loads=0, unloads=0, replacements=0, refusals=0, requests=0, wrong=0
        )
        self.largest_error = 0.0
        self._served: dict[str, str] = {}  # name on the server -> adapter
        self._names = 0

    def run(self, server: Server, steps: int, seed: int = 0) -> None:
        """Run ``steps`` loads, unloads or refusals, each followed by a request; then unload all."""
        random = Random(seed)
        for step in range(steps):
            if step and step % 100 == 0:
                print(step, dict(self.counts), flush=True)
            self._step(server, random)
            if self._served:
                self._request(server, random)
        for name in list(self._served):
            server.unload(name)
            del self._served[name]

    def _step(self, server: Server, random: Random) -> None:
        kind = random.choice(["load", "load", "unload", "bad", "bad", "replace", "bad replacement"])
        names = sorted(self._served)
        if kind == "bad" or (kind == "bad replacement" and names):
            name = f"bad{self.counts['refusals']}" if kind == "bad" else random.choice(names)
            try:
                server.load(name, random.choice(self.bad), inplace=kind != "bad")
                self.counts["wrong"] += 1
            except ServerError as error:
                self.counts["refusals"] += 1
                self.counts["wrong"] += "is refused on vLLM" not in str(error)
        elif kind == "unload" and names:
            name = random.choice(names)
            server.unload(name)
            del self._served[name]
            self.counts["unloads"] += 1
        elif kind == "replace" and names:
            name, adapter = random.choice(names), random.choice(sorted(self.good))
            server.load(name, self.good[adapter], inplace=True)
            self._served[name] = adapter
            self.counts["replacements"] += 1
        else:
            adapter = random.choice(sorted(self.good))
            self._names += 1
            server.load(f"{adapter}{self._names}", self.good[adapter])
            self._served[f"{adapter}{self._names}"] = adapter
            self.counts["loads"] += 1

    def _request(self, server: Server, random: Random) -> None:
        name = random.choice(sorted(self._served))
        answer = server.complete(name, prompts(1)[0], new_tokens=4)
        comparison = self.reference.compare(self._served[name], answer)
        self.counts["requests"] += 1
        self.counts["wrong"] += not comparison.is_exact
        self.largest_error = max(self.largest_error, comparison.error)


def run_soak(steps: int, tensor_parallel_size: int, seed: int) -> dict[str, Any]:
    """Run :class:`Soak` on a new server; return its counts and the processes' resident memory."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = save_qwen3_5(root / "model")
        run = Soak(checkpoint, root)
        slots = ("--max-loras", "4", "--max-cpu-loras", "6")
        with Server(
            checkpoint, root / "log", *slots, plugin=True, tensor_parallel_size=tensor_parallel_size
        ) as server:
            run.run(server, 20, seed + 1)  # lets caches and memory arenas reach their final sizes
            before, warm_up = server.memory(), sum(run.counts.values())
            run.counts.clear()
            run.counts.update(dict.fromkeys(["wrong"], 0))
            first = time.monotonic()
            run.run(server, steps, seed)
            seconds = time.monotonic() - first
            after = server.memory()
    assert warm_up
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "steps": steps,
        **run.counts,
        "largest_logprob_error": round(run.largest_error, 3),
        "resident_mib": {
            title: [round(rss / 2**20) for rss in (before[title], after.get(title, 0))]
            for title in before
        },
        "seconds": round(seconds),
    }


def main() -> int:
    """Run the test that the command line names; write the result as JSON; return 0 if it passed."""
    import vllm

    import vllm_nway_lora

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["mutations", "soak"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "mutations":
        count = (arguments.count or 10_000) // 2
        runs = [run_mutations(count, size, arguments.seed + size) for size in (1, 2)]
    else:
        runs = [run_soak(arguments.count or 500, 2, arguments.seed)]
    result = {
        "vllm": vllm.__version__,
        "vllm-nway-lora": vllm_nway_lora.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": arguments.seed,
        "runs": runs,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"{arguments.what}-{vllm.__version__.partition('+')[0]}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(file.read_text())
    return int(any(run["wrong"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
