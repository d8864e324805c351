"""Measure what requests and adapters cost the engine core: stock vLLM, and the plugin.

Each side is a process that runs the engine core with a tiny Qwen3.5 on CPU. Each round asks both sides for
every action in turn. Counted are the calls to the workers, and the file-system calls that Python reports:
``open``, ``os.listdir`` and ``os.scandir`` by an audit hook, ``os.stat`` and ``os.lstat`` by a wrapper.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from machine import describe, set_engine_environment, write

NAMES = ("stock", "plugin")
#: Slots and places for adapters.
PLACES = 4
REPEATS = 20
AUDITED = ("open", "os.listdir", "os.scandir")


class Core:
    """An engine core in this process, with counters.

    Attributes:
        counts: calls to the workers (``rpc``) and to the file system (``files``) while counting.
    """

    def __init__(self, checkpoint: Path, adapters: Path) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._request_class, self._adapters = LoRARequest, adapters
        self._sampling = SamplingParams(max_tokens=4)
        self._engine = LLM(
            str(checkpoint),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=16,
            enable_lora=True,
            max_loras=PLACES,
            max_lora_rank=16,
        ).llm_engine
        self._core: Any = self._engine.engine_core.engine_core
        self._number = 0
        self.counts: Counter[str] = Counter()
        self._is_counting = False
        self._watch()

    def _watch(self) -> None:
        def count(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.counts[kind] += self._is_counting
                return function(*args, **kwargs)

            return counted

        def audit(event: str, _: Any) -> None:
            if event in AUDITED:
                self.counts["files"] += self._is_counting

        sys.addaudithook(audit)
        for name in ("stat", "lstat"):
            setattr(os, name, count("files", getattr(os, name)))
        executor = self._core.model_executor
        executor.collective_rpc = count("rpc", executor.collective_rpc)

    def measure(self, action: str) -> tuple[float, float, float]:
        """Return microseconds, calls to workers and file-system calls of one action (means)."""
        self.counts.clear()
        seconds = 0.0
        for run in self._prepare(action):
            self._is_counting = True
            started = time.process_time()
            with contextlib.suppress(Exception):  # a refused adapter
                run()
            seconds += time.process_time() - started
            self._is_counting = False
        return tuple(  # type: ignore[return-value]
            value / REPEATS for value in (seconds * 1e6, self.counts["rpc"], self.counts["files"])
        )

    def _prepare(self, action: str) -> Iterator[Callable[[], Any]]:
        """Yield each call that is measured, after what it needs."""
        for _ in range(REPEATS):
            if action == "a request, its adapter is resident":
                resident = self._adapter("good", 1)
                self._engine.add_lora(resident)
                yield self._arrival(resident)
                self._core.abort_requests([str(self._number)])
                continue
            self._empty()
            if action == "an adapter is loaded":
                yield lambda: self._engine.add_lora(self._adapter("good", 1))
            elif action == "an adapter is refused":
                yield lambda: self._engine.add_lora(self._adapter("wide", 1))
            elif action == "an adapter is loaded in the place of another":
                for number in range(PLACES):
                    self._engine.add_lora(self._adapter("good", 1 + number))
                yield lambda: self._engine.add_lora(self._adapter("good", 1 + PLACES))
            else:
                self._engine.add_lora(self._adapter("good", 1))
                yield lambda: self._engine.remove_lora(1)

    def _adapter(self, folder: str, number: int) -> Any:
        return self._request_class(f"{folder}-{number}", number, str(self._adapters / folder))

    def _arrival(self, adapter: Any) -> Callable[[], Any]:
        """Return a call of ``EngineCore.add_request`` with a new request."""
        self._number += 1
        found: list[Any] = []
        client, core = self._engine.engine_core, self._core
        stock = client.add_request
        client.add_request = found.append
        try:
            self._engine.add_request(
                str(self._number), {"prompt_token_ids": [3, 4, 5]}, self._sampling, adapter
            )
        finally:
            client.add_request = stock
        request, wave = core.preprocess_add_request(found[0])
        return lambda: core.add_request(request, wave)

    def _empty(self) -> None:
        for number in range(1, PLACES + 2):
            self._engine.remove_lora(number)


ACTIONS = (
    "a request, its adapter is resident",
    "an adapter is loaded",
    "an adapter is loaded in the place of another",
    "an adapter is refused",
    "an adapter is removed",
)


def serve(pipe: Connection, name: str, checkpoint: Path, adapters: Path) -> None:
    """Run an engine core in this process, and answer each action with its cost."""
    set_engine_environment(plugin=name == "plugin")
    core = Core(checkpoint, adapters)
    pipe.send(None)
    while True:
        pipe.send(core.measure(pipe.recv()))


def main() -> int:
    """Measure and save ``costs.json``; return 0."""
    from support.adapters import QWEN3_5, save_adapter
    from support.checkpoints import save_qwen3_5

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {
        action: {name: [] for name in NAMES} for action in ACTIONS
    }
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        checkpoint = save_qwen3_5(folder / "model")
        save_adapter(checkpoint, folder / "good", QWEN3_5["all"], 0)
        shutil.copytree(folder / "good", folder / "wide")
        config = folder / "wide" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 64}))
        pipes = {}
        for name in NAMES:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, checkpoint, folder))
            process.start()
            stack.callback(process.kill)
            pipes[name].recv()  # it is ready
        for number in range(arguments.rounds + 1):  # the first round warms up
            for action in ACTIONS:
                for name in NAMES:
                    pipes[name].send(action)
                    taken = pipes[name].recv()
                    if number:
                        found[action][name].append(taken)
    rows = [
        {
            "action": action,
            **{
                key: {n: round(statistics.median(x[place] for x in sides[n]), 1) for n in NAMES}
                for place, key in enumerate(("us", "rpcs", "file_system_calls"))
            },
        }
        for action, sides in found.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    machine = describe() | {"clock": "processor", "rounds": arguments.rounds}
    write(arguments.results / "costs.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
