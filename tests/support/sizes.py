"""The faults that admission finds between one of vLLM's own layers and tensors of some sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

HIDDEN, RANK = 32, 4


def find_faults(kind: str, shapes: list[tuple[int, int]], shared: bool = False) -> list[str]:
    """Return the faults between a layer and an adapter's modules.

    Args:
        kind: the layer.
        shapes: per module A's columns and B's rows.
        shared: ``--enable-moe-shared-loras``.
    """
    from torch import nn
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    from vllm_nway_lora.adapters.fit import validate_layer

    class Replicated(MergedColumnParallelLinear):
        """Has a loader of its own, which may repeat rows."""

        def weight_loader(self, *args: Any, **kwargs: Any) -> None:
            super().weight_loader(*args, **kwargs)

    if kind == "qkv":
        base: Any = QKVParallelLinear(HIDDEN, 8, 4, 4, bias=False)
        base.v_head_size = 4
    elif kind == "own loader":
        base = Replicated(HIDDEN, [16, 16], bias=False)
    else:
        base = MergedColumnParallelLinear(HIDDEN, [16] * 4, bias=False)
    weights_of = [
        (
            f"m{number}",
            SimpleNamespace(
                lora_a=torch.ones(RANK, columns),
                lora_b=torch.ones(rows, RANK),
                rank=RANK,
                scaling=1.0,
            ),
        )
        for number, (columns, rows) in enumerate(shapes)
    ]
    manager = SimpleNamespace(
        lora_config=SimpleNamespace(max_lora_rank=RANK),
        model=nn.Module(),
        _enable_moe_shared_loras=shared,
    )
    return validate_layer(manager, "x", SimpleNamespace(base_layer=base), weights_of)
