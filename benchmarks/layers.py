"""Measure one LoRA layer at a time: stock vLLM's and the plugin's, in turn, in one process.

``benchmarks/run.py layers`` runs this script in the default release's environment. Where vLLM for
CUDA and the plugin are installed, ``python -P benchmarks/layers.py --device cuda`` measures the GPU.

Variants, on the same base weight and the same adapters:

- ``stock``: vLLM's own LoRA layer
- ``slices``: the plugin's layer with vLLM's own kernels; shows the gain of one slice per module
- ``plugin``: the plugin's layer with its own CPU kernels (on a GPU the same as ``slices``)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch
from cases import Case, cases
from machine import describe, write
from support import work
from support.ranks import Ranks
from timing import CLOCKS, Clock, ratio, time_in_turn

import vllm_nway_lora

# One slot stays empty: on CPU, vLLM up to 0.32.0 adds the last slot's LoRA to tokens without LoRA.
MAX_LORAS = 5
DTYPE = torch.bfloat16


class Bench:
    """The LoRA layers of one projection on this TP rank, and their measurement."""

    def __init__(self, case: Case, device: str) -> None:
        from vllm.config.lora import LoRAConfig
        from vllm.lora import utils, worker_manager  # noqa: F401  (its import applies the patches)
        from vllm.lora.punica_wrapper import get_punica_wrapper
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear

        from vllm_nway_lora.layers.punica import group_by_adapter

        shape = self.shape = case.shape
        self.case, self.device = case, device
        # Ranks that gather must make the same number of calls.
        self._max_repeats = 1 if case.fully_sharded else 200
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

        self.grouped = group_by_adapter(self.punica)

        def wrapped(punica: Any) -> Any:
            layer = utils.from_layer(base, MAX_LORAS, config, list(shape.modules), None)
            layer.set_mapping(punica)
            return layer

        self.variants: dict[str, Any] = {}
        if case.has_stock_layer:
            os.environ["VLLM_NWAY_LORA"] = "0"
            vllm_nway_lora.unregister()
            self.variants["stock"] = wrapped(self.punica)
        os.environ["VLLM_NWAY_LORA"] = "1"
        vllm_nway_lora.register()
        self.variants["slices"] = wrapped(self.punica)
        self.variants["plugin"] = wrapped(self.grouped)
        self.adapter = self._adapter()
        for layer in self.variants.values():
            for slot in range(case.adapters):
                layer.set_lora(slot, *self.adapter)
        self.x = torch.randn(case.tokens, shape.input_size).to(device, DTYPE)
        width = base.output_size_per_partition
        self.y = torch.zeros(case.tokens, width, dtype=DTYPE, device=device)
        self._set_mapping()

    def _adapter(self) -> tuple[Any, Any]:
        rank, shape = self.case.rank, self.shape
        groups = {1: [shape.sizes], 2: [shape.sizes[:-1], shape.sizes[-1:]]}[len(shape.modules)]
        # Small values, because every call adds LoRA to the same output.
        a = [torch.randn(rank, shape.input_size).to(DTYPE) / 100 for _ in groups]
        b = [torch.randn(sum(sizes), rank).to(DTYPE) / 100 for sizes in groups]
        return (a, b) if len(groups) > 1 else (a[0], b[0])

    def _set_mapping(self) -> None:
        from vllm.lora.layers import LoRAMapping

        # Consecutive tokens share an adapter, as in a batch of requests. vLLM's worker always sets
        # is_prefill to True.
        per_adapter = self.case.tokens // self.case.adapters
        slots = [min(t // per_adapter, self.case.adapters - 1) for t in range(self.case.tokens)]
        ids = tuple(slot + 1 for slot in slots)
        for punica in (self.punica, self.grouped):
            punica.update_metadata(
                LoRAMapping(ids, ids, is_prefill=True),
                list(range(1, MAX_LORAS + 1)),
                MAX_LORAS,
                512,
            )

    def times(self, rounds: int, clock: Clock) -> dict[str, list[float]]:
        """Time each variant's LoRA part and the base product; return seconds per round by name."""
        calls: dict[str, Callable[[], Any]] = {"base": lambda: self.base(self.x)}
        for name, layer in self.variants.items():
            call = torch.compile(layer) if self.case.compiled else layer
            calls[name] = functools.partial(self._run_lora_part, layer, call)
        for _, call in itertools.product(range(2), calls.values()):
            call()  # compile, and touch all memory
        return time_in_turn(calls, self._max_repeats, rounds, clock, self._synchronize)

    def load_times(self, rounds: int, clock: Clock) -> dict[str, list[float]]:
        """Time ``set_lora`` of one adapter for each variant; return seconds per round by name."""
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(layer.set_lora, 0, *self.adapter)
            for name, layer in self.variants.items()
            if name != "slices"  # same code as "plugin"
        }
        return time_in_turn(calls, self._max_repeats, rounds, clock, self._synchronize)

    def sizes(self) -> dict[str, Any]:
        """Return bytes of LoRA-A and LoRA-B, bytes gathered per forward pass, and multiply-adds."""
        from vllm.lora.layers import column_parallel_linear

        found: dict[str, Any] = {}
        for name, layer in self.variants.items():
            gather = column_parallel_linear.tensor_model_parallel_all_gather
            with mock.patch.object(
                column_parallel_linear, "tensor_model_parallel_all_gather", side_effect=gather
            ) as gathers:
                count = work.multiply_adds(functools.partial(self._run_lora_part, layer, layer))
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

    def _run_lora_part(self, layer: Any, call: Callable[[torch.Tensor], Any]) -> None:
        # Leave the base product out instead of subtracting its time: the difference of two long times
        # is mostly noise.
        with work.without_base(layer, self.y):
            call(self.x)

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


def measure(case: Case, rounds: int, device: str, threads: int, clock: Clock) -> dict[str, Any]:
    """Measure one case on this TP rank."""
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
    """Return one row of the results: medians in microseconds and medians of the rounds' ratios."""
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


def main() -> int:
    """Measure the cases and save ``layers.json``; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--full", action="store_true", help="measure every combination (takes hours)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--model", default="", help="measure only shapes whose name starts with this"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, help="threads per TP rank; default: cores divided by TP ranks"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor time excludes other work on the machine; it needs --threads 1",
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
                # Save after each case, so that an interrupted run keeps its results.
                write(arguments.results / f"{name}.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
