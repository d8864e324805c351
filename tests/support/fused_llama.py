"""A Llama with N-way fused projections, for releases of vLLM that do not serve Qwen3.5's text model.

Attention, norms and embeddings are Llama's. The MLP has the fused projection of Qwen3.5 (outputs q, k,
v, z; modules ``in_proj_qkv`` and ``in_proj_z``) and one of Qwen3-Next's kind (one module,
``in_proj_ba``, with one output). This file has the reference, built on transformers;
``fused_llama_vllm`` has the same model, built from vLLM's layers.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

#: Rows of q, k, v and z in every layer.
SIZES = (64, 64, 128, 128)
ARCHITECTURE = "FusedLlamaForCausalLM"


def combine_projections(qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
    """Combine the projections' outputs, full or one TP rank's part; return ``(..., width of v)``."""
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
        return self.down_proj(combine_projections(qkvz, self.in_proj_ba(x)))


class FusedLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = FusedLlamaMLP(config.hidden_size)
        self.post_init()


def register() -> None:
    """Register the model in vLLM; ``plugin/`` has the entry point, which all vLLM processes call."""
    from vllm import ModelRegistry

    from support.cpu import disable_pinned_memory
    from support.fused_llama_vllm import FusedLlamaForCausalLM

    disable_pinned_memory()
    # Register the class, not its name: vLLM would start another process to inspect a named class.
    ModelRegistry.register_model(ARCHITECTURE, FusedLlamaForCausalLM)
