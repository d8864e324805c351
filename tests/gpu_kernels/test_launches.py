"""The programs that vLLM's kernels launch: fewer slices are fewer programs of the shrink kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import gpu
from vllm.config import VllmConfig, set_current_vllm_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import launches
from shapes import Shape


@pytest.mark.skipif(gpu.is_native(), reason="counted without a GPU")
@pytest.mark.parametrize(
    "shape", [*launches.chosen_shapes(), launches.EQUAL], ids=lambda shape: shape.name
)
def test_shrink_programs_follow_the_slices(shape: Shape) -> None:
    with torch.inference_mode(), set_current_vllm_config(VllmConfig()):
        projection = launches.Projection(shape, 16)
        calls = projection.calls(8, 1)
        stock, plugin = (
            launches.count(projection.layers[name], calls[f"lora {name}"])
            for name in ("stock", "plugin")
        )
    assert plugin["shrink"] * stock["slices"] == stock["shrink"] * plugin["slices"]
    assert plugin["slices"] <= stock["slices"]
    if plugin["slices"] == 1:
        assert plugin["expand"] < stock["expand"]
