"""Sizes that several families of the oracle have in common."""

from __future__ import annotations

from typing import Any

from support.oracle_family import SMALL, Family

#: Sizes that vLLM's CPU kernels of gated delta nets accept; they compute in bfloat16 only.
GDN = {
    "head_dim": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
SHARED = {**MOE, "shared_expert_intermediate_size": 64}
#: All experts for each token: in bfloat16, rounding would choose other experts.
ALL = {**SHARED, "num_experts_per_tok": 4}
DEEPSEEK = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
#: Sizes that vLLM's CPU kernel of MLA accepts.
MLA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": 64,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 64,
}
GRANITE = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.18,
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
}
#: These model classes have one weight for input and output.
TIED = {"tie_word_embeddings": True}


def of(name: str, model_type: str, architecture: str, **sizes: Any) -> Family:
    """Return a family that transformers can save; ``sizes`` also has the fields of ``Family``."""
    options = {
        key: sizes.pop(key) for key in ("dtype", "experts", "engine", "transposed") if key in sizes
    }
    config = {**SMALL, "model_type": model_type, "architectures": [architecture], **sizes}
    return Family(name, config, **options)
