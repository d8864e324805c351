"""Count the programs that vLLM's Triton kernels for LoRA launch, for stock's layer and the plugin's.

No GPU is needed: the kernels are replaced by recorders of their grids and arguments. Writes
``launches.json``. vLLM sizes the grid of the expand kernel by the widest slice; the programs beyond a
slice's own width return at once and are counted apart.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from gpu import Projection, chosen_shapes
from machine import describe, write
from shapes import Shape
from support import gpu

RANK, TOKENS, ADAPTERS = 16, (1, 512), (1, 4)
#: Four equal outputs, as the sizes of Qwen3.5-0.8B and 2B have: one slice of three, one of one.
EQUAL = Shape("Qwen3.5-2B", "in_proj_qkvz", 2048, (2048,) * 4, ("in_proj_qkv", "in_proj_z"))


class Recorder:
    """Stands for a Triton kernel; keeps the grid and the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self._names = list(kernel.arg_names)
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self._names, args, strict=False)) | kwargs
            self.launches.append((grid, given))

        return launch


def count(layer: Any, call: Any) -> dict[str, int]:
    """Return the programs of one call of a layer's LoRA part, by kernel."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    shrink = Recorder(lora_shrink_op._lora_shrink_kernel)
    expand = Recorder(lora_expand_op._lora_expand_kernel)
    with (
        mock.patch.object(lora_shrink_op, "_lora_shrink_kernel", shrink),
        mock.patch.object(lora_expand_op, "_lora_expand_kernel", expand),
    ):
        call()
    [(shrink_grid, _)], [(grid, given)] = shrink.launches, expand.launches
    block = given["BLOCK_N"]
    blocks = [math.ceil(width / block) for width in layer.output_slices]
    launched = math.prod(grid)
    return {
        "slices": len(layer.output_slices),
        "shrink": math.prod(shrink_grid),
        "expand": launched,
        "expand_with_work": launched * sum(blocks) // (max(blocks) * len(blocks)),
    }


def main() -> int:
    """Count and save; return 0."""
    gpu.prepare()
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_nway_lora.diagnosis import offline

    offline.initialize()
    rows = []
    with torch.inference_mode(), set_current_vllm_config(VllmConfig()):
        for shape in (*chosen_shapes(), EQUAL):
            projection = Projection(shape, RANK)
            for tokens, adapters in itertools.product(TOKENS, ADAPTERS):
                if adapters > tokens:
                    continue
                calls = projection.calls(tokens, adapters)
                counts = {
                    name: count(layer, calls[f"lora {name}"])
                    for name, layer in projection.layers.items()
                }
                case = {"tokens": tokens, "adapters": adapters, "rank": RANK}
                rows.append({"model": shape.name, "layer": shape.layer, **case, **counts})
                print(json.dumps(rows[-1]), flush=True)
    path = ROOT / "benchmarks" / "results" / "launches.json"
    write(path, {"machine": describe(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
