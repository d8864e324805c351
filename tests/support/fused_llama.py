"""A Llama with N-way fused projections, for engines of releases that cannot run Qwen3.5 on CPU.

Attention, norms and embeddings are Llama's. The MLP has Qwen3.5's fusion (outputs q, k, v, z; modules
``in_proj_qkv`` and ``in_proj_z``) and Qwen3-Next's (one module ``in_proj_ba`` of one output). Here is
the model on transformers, the reference; ``fused_llama_vllm`` is the same from vLLM's layers.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

#: Rows of q, k, v and z of every layer.
SIZES = (64, 64, 128, 128)
ARCHITECTURE = "FusedLlamaForCausalLM"


def mix(qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
    """Combine the projections, whole or one rank's share: ``(..., width of v)``."""
    half = qkvz.shape[-1] // 6
    q, k, v, z = qkvz.split([half, half, 2 * half, 2 * half], dim=-1)
    gate = (nn.functional.silu(q) * k).repeat_interleave(2, dim=-1)
    return gate + v * nn.functional.silu(z) + ba


class FusedLlamaMLP(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        q, k, v, z = SIZES
        self.in_proj_qkv = nn.Linear(hidden_size, q + k + v, bias=False)
        self.in_proj_z = nn.Linear(hidden_size, z, bias=False)
        self.in_proj_ba = nn.Linear(hidden_size, v, bias=False)
        self.down_proj = nn.Linear(v, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkvz = torch.cat([self.in_proj_qkv(x), self.in_proj_z(x)], dim=-1)
        return self.down_proj(mix(qkvz, self.in_proj_ba(x)))


class FusedLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = FusedLlamaMLP(config.hidden_size)
        self.post_init()


def register() -> None:
    """Give vLLM the model: the entry point in ``plugin/``, called in all of vLLM's processes."""
    from vllm import ModelRegistry

    from support.cpu import unpin
    from support.fused_llama_vllm import FusedLlamaForCausalLM

    unpin()
    # The class itself: of a name, vLLM has a process of its own find out what the class can do.
    ModelRegistry.register_model(ARCHITECTURE, FusedLlamaForCausalLM)
