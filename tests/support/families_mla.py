"""Families with multi-head latent attention: its down-projections, and sparse attention's indexer.

Both are on every rank whole (``disable_tp``). The layers' paths are those that the forward uses: the
attention wrapper's, not those of its parent, where the same layers can be found too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.family import ALWAYS_EXACT, COMMON, HIDDEN, LAYER, REFUSED, VLLM, Family, Fused

_ATTENTION = f"{LAYER}.self_attn"
_MLA: Mapping[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def _down(stock: tuple[str, str, str, str] = ALWAYS_EXACT) -> Fused:
    return Fused(
        f"{_ATTENTION}.mla_attn.fused_qkv_a_proj",
        {f"{_ATTENTION}.q_a_proj": 24, f"{_ATTENTION}.kv_a_proj_with_mqa": 48},
        stock,
    )


#: The attention itself, which LoRA does not see; its CPU kernel has no sparse variant.
_STUBS = (f"{VLLM}.layers.mla.MLAAttention",)

MLA_FAMILIES = (
    Family(
        "DeepSeek-V3, Kimi-K2, Mistral Large 3",
        {**_MLA, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
        (_down(),),
        stubs=_STUBS,
    ),
    Family(
        "DeepSeek-V3.2",
        {
            **_MLA,
            "model_type": "deepseek_v32",
            "architectures": ["DeepseekV32ForCausalLM"],
            "index_topk": 8,
            "index_n_heads": 8,
            "index_head_dim": 32,
        },
        (
            _down(),
            Fused(
                f"{_ATTENTION}.indexer.wk_weights_proj",
                {f"{_ATTENTION}.indexer.wk": 32, f"{_ATTENTION}.indexer.weights_proj": 8},
                (REFUSED,) * 4,
            ),
        ),
        stubs=_STUBS,
    ),
)
