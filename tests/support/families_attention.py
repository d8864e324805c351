"""Families whose attention is their own: Kimi's and GLM's delta attention, sparse ones, and others."""

from __future__ import annotations

from support.family import GDN, GDN_LAYER, HIDDEN, UNWRAPPED, Family, Fused

_ALICE = "vllm.model_executor.models.alice_ai"

ATTENTION_FAMILIES = (
    Family(
        "AliceAI",
        {
            **GDN,
            "model_type": "qwen3_next",
            "architectures": ["AliceAIForCausalLM"],
            "linear_num_value_heads": 8,
            "num_experts": 8,
            "block_attn_res_block_size": 2,
            "kda_allow_negative_eigenvalues": False,
            "router_score_function": "sigmoid",
            "router_bias_correction": True,
        },
        (
            Fused(
                f"{GDN_LAYER}.in_proj_qkvgfab",
                {
                    **{f"{GDN_LAYER}.{part}_proj": 128 for part in "qkv"},
                    f"{GDN_LAYER}.b_proj": 8,
                    f"{GDN_LAYER}.f_a_proj": 16,
                },
                UNWRAPPED,
            ),
        ),
        stubs=(
            f"{_ALICE}.AliceAISparseMoeBlock",
            f"{_ALICE}.is_model_fused_shared_expert_compatible",
            f"{_ALICE}.AliceAIForCausalLM.set_moe_parameters",
        ),
        since="0.33.0",
        required={
            f"model.{name}": shape
            for layer in ("attnres_final.", "layers.0.mlp_", "layers.1.mlp_", "layers.1.attn_")
            for name, shape in (
                (f"{layer}res_norm_weight", (HIDDEN,)),
                (f"{layer}res_proj.weight", (1, HIDDEN)),
            )
        },
    ),
)
