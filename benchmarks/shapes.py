"""Fused projections of real models, with sizes from the published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A fused projection.

    Attributes:
        name: the model's name.
        layer: the projection's name in vLLM.
        input_size: columns of its weight.
        sizes: rows of each output in vLLM's layer.
        modules: names of its modules in adapters.
    """

    name: str
    layer: str
    input_size: int
    sizes: tuple[int, ...]
    modules: tuple[str, ...]


_QKVZ = (2048, 2048, 4096, 4096)  # q and k: 16 heads each; v and z: 32 heads each; head size 128

SHAPES = (
    Shape("Qwen3.5-9B", "in_proj_qkvz", 4096, _QKVZ, ("in_proj_qkv", "in_proj_z")),
    Shape("Qwen3.5-35B-A3B", "in_proj_qkvz", 2048, _QKVZ, ("in_proj_qkv", "in_proj_z")),
    Shape("Qwen3-Next-80B-A3B", "in_proj_qkvz", 2048, (sum(_QKVZ),), ("in_proj_qkvz",)),
    # Mamba2 with 8 groups. Gate and x: 128 heads of size 64; B and C: 8 groups of size 128; then dt.
    Shape("Nemotron-H-8B", "in_proj", 4096, (8192, 8192, 1024, 1024, 128), ("in_proj",)),
    Shape("LFM2-1.2B", "in_proj", 2048, (2048,) * 3, ("in_proj",)),
)
