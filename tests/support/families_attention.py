"""Families whose attention is their own: Kimi's and GLM's delta attention, sparse ones, and others."""

from __future__ import annotations

from support.family import COMMON, GDN, GDN_LAYER, HIDDEN, REFUSED, UNWRAPPED, Family, Fused

_ALICE = "vllm.model_executor.models.alice_ai"

_GLM = "model.language_model.layers"

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
    Family(
        "GLM-5-Next",
        {
            "model_type": "glm5_next",
            "architectures": ["Glm5NextForConditionalGeneration"],
            "text_config": {
                **COMMON,
                "model_type": "glm5_next_text",
                "num_hidden_layers": 2,
                "layer_types": ["linear_attention", "indexed_attention"],
                "mlp_layer_types": ["dense", "dense"],
                "n_routed_experts": 8,
                "mhc": False,
                "mla_use_nope": True,
                "pad_token_id": 2,
                "linear_head_dim": 16,
                "linear_num_heads": 8,
                "q_lora_rank": 24,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "index_topk": 32,
                "index_head_dim": 128,
                "index_n_heads": 4,
                "index_kpool": 16,
                "indexer_rope_interleave": True,
            },
            "vision_config": {
                "model_type": "glm5_next_vision",
                "depth": 1,
                "hidden_size": 64,
                "num_heads": 8,
                "intermediate_size": 64,
                "out_hidden_size": HIDDEN,
            },
        },
        (
            Fused(
                "language_model.model.layers.0.self_attn.in_proj_qkvbfg_a",
                {
                    **{f"{_GLM}.0.self_attn.{part}_proj": 128 for part in "qkv"},
                    f"{_GLM}.0.self_attn.b_proj": 8,
                    f"{_GLM}.0.self_attn.f_a_proj": 16,
                    f"{_GLM}.0.self_attn.g_a_proj": 16,
                },
                (REFUSED,) * 4,
            ),
            Fused(
                "language_model.model.layers.1.self_attn.fused_qkv_a_proj",
                {
                    f"{_GLM}.1.self_attn.q_a_proj": 24,
                    f"{_GLM}.1.self_attn.kv_a_proj_with_mqa": 32,
                },
                (REFUSED,) * 4,
            ),
            Fused(
                "language_model.model.layers.1.self_attn.indexer.wk_weights_proj",
                {
                    f"{_GLM}.1.self_attn.indexer.wk": 128,
                    f"{_GLM}.1.self_attn.indexer.weights_proj": 4,
                },
                (REFUSED,) * 4,
            ),
        ),
        stubs=("vllm.model_executor.layers.mla.MLAAttention",),
        since="0.33.0",
    ),
)
