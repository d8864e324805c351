"""Families with their own gated delta nets, or with Qwen's in their own model class."""

from __future__ import annotations

from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    EXACT,
    FAILS,
    GDN,
    GDN_LAYER,
    HIDDEN,
    IGNORED,
    LAYER,
    REFUSED,
    Family,
    Fused,
)
from support.families.qwen3_5 import delta_net

_ALICE = "vllm.model_executor.models.alice_ai"
_QWEN4 = "vllm.models.qwen4_exp.nvidia.model"
_GLM = "model.language_model.layers"

DELTA_FAMILIES = (
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
                # Stock vLLM fails at warm-up, because `packed_modules_mapping` has an entry for `conv1d`.
                # Without that entry the outcomes are: exact, wrong, ignored, ignored.
                (FAILS,) * 4,
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
                    # The indexer multiplies by a float32 copy of these rows.
                    f"{_GLM}.1.self_attn.indexer.weights_proj": 4,
                },
                (REFUSED,) * 4,
            ),
        ),
        stubs=("vllm.model_executor.layers.mla.MLAAttention",),
        since="0.33.0",
    ),
    *(
        Family(
            f"Qwen4-Exp, hyper-connections {how}",
            {
                **GDN,
                "model_type": "qwen4_exp_text",
                "architectures": ["Qwen4ExpForCausalLM"],
                "layer_types": ["linear_attention", "indexed_attention"],
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "eos_token_id": 1,
                "output_gate_type": "silu",
                "hc_count": 4,
                "hc_lowrank": lowrank,
                "ple_layer_ids": [1],
                "ple_embed_dim": 64,
                "ngram_size": 2,
                "heads_per_ngram": 1,
                "ngram_vocab_size_base": 128,
                "split_ngram_parts": 1,
            },
            (
                delta_net(GDN_LAYER, GDN_LAYER)[0],
                Fused(
                    f"{LAYER}.attn_hyper_connection.input_mix_weight_down_block_inject",
                    {
                        f"{LAYER}.attn_hyper_connection.input_mix_weight_down": lowrank,
                        f"{LAYER}.attn_hyper_connection.block_inject_weight": 4,
                    },
                    (*stock, IGNORED, IGNORED),
                    columns=4 * HIDDEN,
                    outputs=outputs,
                ),
                Fused(
                    f"{LAYER}.ple.kv_proj",
                    {f"{LAYER}.ple.key_proj": 4 * HIDDEN, f"{LAYER}.ple.value_proj": HIDDEN},
                    ALWAYS_EXACT,
                ),
            ),
            stubs=(
                "vllm.models.qwen4_exp.nvidia.ple_layer.Qwen4ExpNGramEmbedding",
                f"{_QWEN4}.Qwen4ExpSparseMoeBlock",
                f"{_QWEN4}.is_model_fused_shared_expert_compatible",
                f"{_QWEN4}.Qwen4ExpForCausalLM.set_moe_parameters",
            ),
            since="0.33.0",
        )
        # Padding to a multiple of 16 rows is a third output; `packed_modules_mapping` lists a module
        # for it that no adapter has.
        for how, lowrank, outputs, stock in (
            ("padded", 16, 3, (EXACT, EXACT)),
            ("without padding", 12, 2, (REFUSED, REFUSED)),
        )
    ),
)
