"""One LoRA layer at a time: stock vLLM's and the plugin's, in one process, in turn.

``benchmarks/run.py layers`` runs this in the default release's environment. With a vLLM for CUDA and
the plugin installed, ``python -P benchmarks/layers.py --device cuda`` runs it on that machine's GPU.

Variants, on the same base weight and the same adapters:

- ``stock``: vLLM's own LoRA layer
- ``slices``: the plugin's layer with vLLM's own kernels: what one slice per module gains
- ``plugin``: the plugin's layer as it is (on a GPU the same as ``slices``)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch
from machine import describe, write
from shapes import SHAPES, Shape
from support import work
from support.ranks import Ranks

import vllm_nway_lora

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.thread_time}
MAX_LORAS = 5  # one stays empty: on CPU, vLLM to 0.32.0 gives tokens without LoRA the last slot's
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a projection, LoRA's r, a batch, and how the layer runs."""

    shape: Shape
    tensor_parallel_size: int = 1
    rank: int = 16
    tokens: int = 64
    adapters: int = 1
    compiled: bool = False
    fully_sharded: bool = False

    @property
    def stock_serves(self) -> bool:
        """Tell whether stock vLLM has a LoRA layer for it, rightly or wrongly."""
        return not (
            self.fully_sharded and len(self.shape.sizes) > 2 and len(self.shape.modules) == 1
        )


def cases(full: bool) -> Iterator[Case]:
    """Yield the cases: all, or those that show each quantity's effect."""
    ranks, tokens, adapters = (8, 16, 64), (1, 8, 64, 512), (1, 4)
    if full:
        for shape, size, rank, count, several, compiled in itertools.product(
            SHAPES, (1, 2), ranks, tokens, adapters, (False, True)
        ):
            if several <= count:
                yield Case(shape, size, rank, count, several, compiled)
        yield from (Case(shape, 2, fully_sharded=True) for shape in SHAPES)
        return
    for rank, count, several in itertools.product(ranks, tokens, adapters):
        if several <= count:
            yield Case(SHAPES[0], rank=rank, tokens=count, adapters=several)
    for shape, count, several in itertools.product(SHAPES[1:], (1, 64, 512), adapters):
        if several <= count:
            yield Case(shape, tokens=count, adapters=several)
    for shape, count in itertools.product((SHAPES[0], SHAPES[3]), (1, 64)):
        yield Case(shape, tokens=count, compiled=True)
    for shape, count in itertools.product(SHAPES, (1, 64)):
        yield Case(shape, 2, tokens=count)
    yield from (Case(shape, 2, fully_sharded=True) for shape in SHAPES)


class Bench:
    """The layers of one projection on this rank, and their measurement."""

    def __init__(self, case: Case, device: str) -> None:
        from vllm.config.lora import LoRAConfig
        from vllm.lora import utils, worker_manager  # noqa: F401  (its import applies the patches)
        from vllm.lora.layers.base import BaseLayerWithLoRA
        from vllm.lora.punica_wrapper import get_punica_wrapper
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear

        shape = self.shape = case.shape
        self.case, self.device = case, device
        # Ranks that gather must call as often as each other.
        self._most = 1 if case.fully_sharded else 200
        torch.manual_seed(0)
        base = self.base = MergedColumnParallelLinear(
            shape.input_size,
            list(shape.sizes),
            bias=False,
            params_dtype=DTYPE,
            prefix=f"model.layers.0.mixer.{shape.layer}",
        ).to(device)
        base.weight.data.normal_(std=0.02)
        base.quant_method.process_weights_after_loading(base)
        config = LoRAConfig(
            max_lora_rank=case.rank,
            max_loras=MAX_LORAS,
            fully_sharded_loras=case.fully_sharded,
            lora_dtype=DTYPE,
        )
        self.punica = get_punica_wrapper(
            case.tokens, case.tokens, torch.device(device), lora_config=config, max_loras=MAX_LORAS
        )

        def wrapped(set_mapping: Callable[[Any, Any], None]) -> Any:
            layer = utils.from_layer(base, MAX_LORAS, config, list(shape.modules), None)
            set_mapping(layer, self.punica)
            return layer

        self.variants: dict[str, Any] = {}
        if case.stock_serves:
            os.environ["VLLM_NWAY_LORA"] = "0"
            vllm_nway_lora.unregister()
            self.variants["stock"] = wrapped(BaseLayerWithLoRA.set_mapping)
        os.environ["VLLM_NWAY_LORA"] = "1"
        vllm_nway_lora.register()
        self.variants["slices"] = wrapped(BaseLayerWithLoRA.set_mapping)
        self.variants["plugin"] = wrapped(lambda layer, punica: layer.set_mapping(punica))
        self.adapter = self._adapter()
        for layer in self.variants.values():
            for slot in range(case.adapters):
                layer.set_lora(slot, *self.adapter)
        self.x = torch.randn(case.tokens, shape.input_size).to(device, DTYPE)
        width = base.output_size_per_partition
        self.y = torch.zeros(case.tokens, width, dtype=DTYPE, device=device)
        self._map()

    def _adapter(self) -> tuple[Any, Any]:
        rank, shape = self.case.rank, self.shape
        groups = {1: [shape.sizes], 2: [shape.sizes[:-1], shape.sizes[-1:]]}[len(shape.modules)]
        # Small: LoRA is added to one output again and again.
        a = [torch.randn(rank, shape.input_size).to(DTYPE) / 100 for _ in groups]
        b = [torch.randn(sum(sizes), rank).to(DTYPE) / 100 for sizes in groups]
        return (a, b) if len(groups) > 1 else (a[0], b[0])

    def _map(self) -> None:
        from vllm.lora.layers import LoRAMapping

        # Sequences of one adapter each, as in a batch of requests; vLLM's worker says "prefill" always.
        per_adapter = self.case.tokens // self.case.adapters
        slots = [min(t // per_adapter, self.case.adapters - 1) for t in range(self.case.tokens)]
        ids = tuple(slot + 1 for slot in slots)
        self.punica.update_metadata(
            LoRAMapping(ids, ids, is_prefill=True), list(range(1, MAX_LORAS + 1)), MAX_LORAS, 512
        )

    def times(self, rounds: int, clock: Clock) -> dict[str, list[float]]:
        """Return seconds per round of each variant's LoRA part, and of the base product."""
        calls: dict[str, Callable[[], Any]] = {"base": lambda: self.base(self.x)}
        for name, layer in self.variants.items():
            call = torch.compile(layer) if self.case.compiled else layer
            calls[name] = functools.partial(self._lora_part, layer, call)
        for _, call in itertools.product(range(2), calls.values()):
            call()  # compiles, and touches all memory
        return in_turn(calls, self._most, rounds, clock, self._wait)

    def load_times(self, rounds: int, clock: Clock) -> dict[str, list[float]]:
        """Return seconds per round of putting one adapter into a slot, for each variant."""
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(layer.set_lora, 0, *self.adapter)
            for name, layer in self.variants.items()
            if name != "slices"  # the same
        }
        return in_turn(calls, self._most, rounds, clock, self._wait)

    def sizes(self) -> dict[str, Any]:
        """Return bytes of LoRA-A and -B, bytes gathered per forward, and multiply-adds."""
        from vllm.lora.layers import column_parallel_linear

        found: dict[str, Any] = {}
        for name, layer in self.variants.items():
            gather = column_parallel_linear.tensor_model_parallel_all_gather
            with mock.patch.object(
                column_parallel_linear, "tensor_model_parallel_all_gather", side_effect=gather
            ) as gathers:
                count = work.multiply_adds(functools.partial(self._lora_part, layer, layer))
            sent = sum(call.args[0].nbytes for call in gathers.call_args_list)
            found[name] = {
                "slices": len(layer.lora_a_stacked),
                "a_bytes": sum(a.nbytes for a in layer.lora_a_stacked),
                "b_bytes": sum(b.nbytes for b in layer.lora_b_stacked),
                "gathered_bytes": sent * self.case.tensor_parallel_size,
                "multiply_adds": count if self.device == "cpu" else None,
            }
        found["floor"] = {
            "multiply_adds": work.floor(
                self.case.tokens,
                len(self.shape.modules),
                self.shape.input_size,
                self.base.output_size_per_partition,
                self.case.rank,
                self.case.tensor_parallel_size if self.case.fully_sharded else 1,
            )
        }
        return found

    def _lora_part(self, layer: Any, call: Callable[[torch.Tensor], Any]) -> None:
        # Layer minus base, by leaving the base product out: a difference of two long times is noise.
        with work.without_base(layer, self.y):
            call(self.x)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


def in_turn(
    calls: dict[str, Callable[[], Any]],
    most: int,
    rounds: int,
    clock: Clock,
    wait: Callable[[], None],
) -> dict[str, list[float]]:
    """Time every call once per round, each round from another one on; return seconds by name."""
    repeats = {}
    for name, call in calls.items():
        started = clock()
        call()
        wait()
        # Short calls several times, for the clock's sake.
        repeats[name] = max(1, min(most, int(0.005 / (clock() - started))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            for _ in range(repeats[name]):
                calls[name]()
            wait()
            seconds[name].append((clock() - started) / repeats[name])
    return seconds


def measure(case: Case, rounds: int, device: str, threads: int, clock: Clock) -> dict[str, Any]:
    """Measure one case on this rank."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    with torch.inference_mode():
        bench = Bench(case, device)
        return {
            "sizes": bench.sizes(),
            "seconds": bench.times(rounds, clock),
            "load_seconds": bench.load_times(rounds, clock),
        }


def summarise(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the results: medians in microseconds, and medians of the rounds' ratios."""
    row: dict[str, Any] = {
        **{name: value for name, value in vars(case).items() if name != "shape"},
        "model": case.shape.name,
        "layer": case.shape.layer,
        "sizes": found["sizes"],
    }
    for what, key in (("lora_us", "seconds"), ("load_us", "load_seconds")):
        seconds = found[key]
        row[what] = {n: round(statistics.median(s) * 1e6, 1) for n, s in seconds.items()}
        if "stock" in seconds:
            row[what.replace("us", "ratio")] = {
                name: round(ratio(seconds[name], seconds["stock"]), 3)
                for name in ("slices", "plugin")
                if name in seconds
            }
    return row


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    """Measure the cases and write ``layers.json``; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the whole product of cases: hours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="", help="only shapes whose name begins so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="per rank; else the cores divided by the ranks")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="with one thread, processor time leaves out what other jobs of the machine take",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if arguments.clock == "processor" and arguments.threads != 1:
        parser.error("--clock processor measures one thread: --threads 1")
    cores = len(os.sched_getaffinity(0))
    machine = describe(arguments.device) | {"clock": arguments.clock, "threads": arguments.threads}
    chosen = [c for c in cases(arguments.full) if c.shape.name.startswith(arguments.model)]
    if arguments.device != "cpu":
        chosen = [case for case in chosen if case.tensor_parallel_size == 1]
    name = "layers" if arguments.device == "cpu" else f"layers-{arguments.device}"
    rows: list[dict[str, Any]] = []
    for size in sorted({case.tensor_parallel_size for case in chosen}):
        with contextlib.closing(Ranks(size)) as ranks:
            for case in (case for case in chosen if case.tensor_parallel_size == size):
                threads = arguments.threads or max(1, cores // size)
                clock = CLOCKS[arguments.clock]
                job = (measure, case, arguments.rounds, arguments.device, threads, clock)
                rows.append(summarise(case, ranks.run(*job)[0]))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "sizes"}), flush=True)
                # After each: a run that is cut short leaves what it has.
                write(arguments.results / f"{name}.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
