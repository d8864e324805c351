"""The model of ``fused_llama``, built from the layers of the running vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models import llama

from support.fused_llama import SIZES, combine_projections

#: Module of a checkpoint -> its fused projection, its first output in it, and its outputs' rows.
SHARDS = {
    "in_proj_qkv": ("in_proj_qkvz", 0, SIZES[:3]),
    "in_proj_z": ("in_proj_qkvz", 3, SIZES[3:]),
    "in_proj_ba": ("in_proj_ba", 0, SIZES[2:3]),
}


class FusedLlamaMLP(nn.Module):
    def __init__(self, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.in_proj_qkvz = MergedColumnParallelLinear(
            hidden_size, list(SIZES), bias=False, prefix=f"{prefix}.in_proj_qkvz"
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            hidden_size, [SIZES[2]], bias=False, prefix=f"{prefix}.in_proj_ba"
        )
        self.down_proj = RowParallelLinear(
            SIZES[2], hidden_size, bias=False, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(combine_projections(self.in_proj_qkvz(x)[0], self.in_proj_ba(x)[0]))[
            0
        ]


class FusedLlamaDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config, prefix, **kwargs)
        self.mlp = FusedLlamaMLP(self.hidden_size, f"{prefix}.mlp")


class FusedLlamaForCausalLM(llama.LlamaForCausalLM):
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
        "in_proj_ba": ["in_proj_ba"],
    }

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=FusedLlamaDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()

        def load_fused() -> Iterable[tuple[str, torch.Tensor]]:
            """Load the weights of fused projections; yield all other weights."""
            for name, weight in weights:
                layer, _, module = name.removesuffix(".weight").rpartition(".")
                if module not in SHARDS:
                    yield name, weight
                    continue
                fused, first, sizes = SHARDS[module]
                target = f"{layer}.{fused}.weight"
                for shard, rows in enumerate(weight.split(sizes), first):
                    parameters[target].weight_loader(parameters[target], rows, shard)
                loaded.add(target)

        return super().load_weights(load_fused()) | loaded
