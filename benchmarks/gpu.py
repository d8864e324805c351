"""Time the plugin's LoRA layer against stock vLLM's on a GPU; write ``gpu.json``.

Each time is that of a replayed CUDA graph, measured with CUDA events: the device's work only, as in an
engine that uses CUDA graphs. All variants of a case run in turn, round by round.

- ``layer``: base product and LoRA. The base weight is larger than the L2 cache, so LoRA's tensors are cold.
- ``lora``: LoRA alone, with its tensors in the L2 cache.

Run it with ``NWAY_LORA_TEST_GPU=cuda``, or with ``1`` if vLLM's compiled extensions are missing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from machine import describe, write
from shapes import SHAPES, Shape
from support import gpu

TOKENS, RANKS, ADAPTERS = (1, 8, 64, 512, 4096), (16, 64), (1, 4)
MAX_LORAS = 4
#: A control: vLLM's own class serves it, with the plugin too.
CONTROL = Shape(
    "Llama-3.1-8B", "qkv_proj", 4096, (4096, 1024, 1024), ("q_proj", "k_proj", "v_proj")
)


def chosen_shapes() -> list[Shape]:
    """Return the measured projections, the most telling one first."""
    by_name = {shape.name: shape for shape in SHAPES}
    return [*(by_name[n] for n in ("Qwen3.5-9B", "Nemotron-H-8B", "LFM2-1.2B")), CONTROL]


class Projection:
    """One base layer on the GPU, wrapped for LoRA by the plugin and by stock vLLM.

    Attributes:
        layers: ``stock`` and ``plugin``.
    """

    def __init__(self, shape: Shape, rank: int) -> None:
        import torch
        from support.gpu_layers import set_plugin
        from vllm.config.lora import LoRAConfig
        from vllm.lora import utils
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

        gpu.forget_addresses()
        torch.manual_seed(0)
        dtype, prefix = torch.bfloat16, f"model.layers.0.mixer.{shape.layer}"
        if shape is CONTROL:
            base = QKVParallelLinear(
                shape.input_size, 128, 32, 8, bias=False, params_dtype=dtype, prefix=prefix
            )
        else:
            base = MergedColumnParallelLinear(
                shape.input_size, list(shape.sizes), bias=False, params_dtype=dtype, prefix=prefix
            )
        self.base = base.to(gpu.device())
        base.weight.data.normal_(std=0.02)
        base.quant_method.process_weights_after_loading(base)
        config = LoRAConfig(max_lora_rank=rank, max_loras=MAX_LORAS, lora_dtype=dtype)
        self.punica = PunicaWrapperGPU(max(TOKENS), max(TOKENS), gpu.device(), lora_config=config)
        self.layers: dict[str, Any] = {}
        groups = [shape.sizes] if len(shape.modules) == 1 else [(size,) for size in shape.sizes]
        if len(shape.modules) == 2:
            groups = [shape.sizes[:-1], shape.sizes[-1:]]
        a = [torch.randn(rank, shape.input_size, dtype=dtype) / 100 for _ in groups]
        b = [torch.randn(sum(sizes), rank, dtype=dtype) / 1000 for sizes in groups]
        for name in ("stock", "plugin"):
            set_plugin(name == "plugin")
            layer = utils.from_layer(base, MAX_LORAS, config, list(shape.modules), None)
            layer.set_mapping(self.punica)
            for slot in range(MAX_LORAS):
                layer.set_lora(slot, *((a, b) if len(groups) > 1 else (a[0], b[0])))
            self.layers[name] = layer

    def calls(self, tokens: int, adapters: int) -> dict[str, Callable[[], Any]]:
        """Return what is timed, by name, for a batch whose consecutive tokens share an adapter."""
        import torch
        from vllm.lora.layers import LoRAMapping

        ids = tuple(1 + token * adapters // tokens for token in range(tokens))
        slots = list(range(1, MAX_LORAS + 1))
        self.punica.update_metadata(
            LoRAMapping(ids, ids, is_prefill=True), slots, MAX_LORAS + 1, 512
        )
        x = torch.randn(tokens, self.base.input_size, dtype=torch.bfloat16, device=gpu.device())
        y = torch.zeros(tokens, self.base.output_size, dtype=torch.bfloat16, device=gpu.device())
        calls: dict[str, Callable[[], Any]] = {"base": functools.partial(self.base, x)}
        for name, layer in self.layers.items():
            calls[f"layer {name}"] = functools.partial(layer, x)
            calls[f"lora {name}"] = functools.partial(
                self.punica.add_lora_linear,
                y,
                x,
                layer.lora_a_stacked,
                layer.lora_b_stacked,
                1.0,
                layer.output_slices,
            )
        return calls


def capture(call: Callable[[], Any], repeats: int) -> Any:
    """Return a CUDA graph of ``repeats`` calls."""
    import torch

    for _ in range(2):  # compiles the kernels and fills their tables of addresses
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def microseconds(graphs: dict[str, Any], repeats: int, rounds: int) -> dict[str, list[float]]:
    """Replay the graphs in turn; return microseconds per call and round."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(3):
        for graph in graphs.values():
            graph.replay()
    for number in range(rounds):
        first = number % len(graphs)
        for name in [*graphs][first:] + [*graphs][:first]:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1000 / repeats)
    return times


def row(
    shape: Shape, projection: Projection, rank: int, tokens: int, adapters: int, rounds: int
) -> dict[str, Any]:
    """Measure one case; return medians in microseconds and medians of the rounds' ratios."""
    repeats = 20 if tokens <= 512 else 5
    graphs = {n: capture(c, repeats) for n, c in projection.calls(tokens, adapters).items()}
    times = microseconds(graphs, repeats, rounds)
    median = statistics.median
    return {
        "model": shape.name,
        "layer": shape.layer,
        "rank": rank,
        "tokens": tokens,
        "adapters": adapters,
        "classes": {n: type(layer).__name__ for n, layer in projection.layers.items()},
        "slices": {n: len(layer.lora_a_stacked) for n, layer in projection.layers.items()},
        "us": {name: round(median(found), 2) for name, found in times.items()},
        "ratio": {
            what: round(
                median(
                    p / s
                    for p, s in zip(times[f"{what} plugin"], times[f"{what} stock"], strict=True)
                ),
                3,
            )
            for what in ("layer", "lora")
        },
    }


def main() -> int:
    """Measure the cases and save ``gpu.json``; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=600, help="start no case after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if not gpu.is_native():
        parser.error(f"set {gpu.VARIABLE}")
    started = time.monotonic()
    gpu.prepare()
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_nway_lora.diagnosis import offline

    offline.initialize()
    machine, rows = describe("cuda") | {"platform": gpu.card()}, []
    with torch.inference_mode(), set_current_vllm_config(VllmConfig()):
        for shape, rank in itertools.product(chosen_shapes(), RANKS):
            projection = Projection(shape, rank)
            for tokens, adapters in itertools.product(TOKENS, ADAPTERS):
                if adapters > tokens or time.monotonic() - started > arguments.seconds:
                    continue
                rows.append(row(shape, projection, rank, tokens, adapters, arguments.rounds))
                print(json.dumps(rows[-1]), flush=True)
                write(arguments.results / "gpu.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
