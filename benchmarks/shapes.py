"""Fused projections of real models, with the sizes of their published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A fused projection.

    Attributes:
        name: the model's.
        layer: the projection's own name.
        input_size: columns of its weight.
        sizes: rows of each of its outputs, as vLLM builds it.
        modules: names under which adapters see it.
    """

    name: str
    layer: str
    input_size: int
    sizes: tuple[int, ...]
    modules: tuple[str, ...]


_QKVZ = (2048, 2048, 4096, 4096)  # 16 heads of q and of k, 32 of v and of z, 128 wide

SHAPES = (
    Shape("Qwen3.5-9B", "in_proj_qkvz", 4096, _QKVZ, ("in_proj_qkv", "in_proj_z")),
    Shape("Qwen3.5-35B-A3B", "in_proj_qkvz", 2048, _QKVZ, ("in_proj_qkv", "in_proj_z")),
    Shape("Qwen3-Next-80B-A3B", "in_proj_qkvz", 2048, (sum(_QKVZ),), ("in_proj_qkvz",)),
    # Mamba2 of 8 groups: gate and x of 128 heads of 64, B and C of 8 groups of 128, dt.
    Shape("Nemotron-H-8B", "in_proj", 4096, (8192, 8192, 1024, 1024, 128), ("in_proj",)),
    Shape("LFM2-1.2B", "in_proj", 2048, (2048,) * 3, ("in_proj",)),
)
