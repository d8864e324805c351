"""Families whose attention is their own: Kimi's and GLM's delta attention, sparse ones, and others."""

from __future__ import annotations

from unittest import mock

from vllm.platforms.interface import DeviceCapability

from support.family import (
    ALWAYS_EXACT,
    EXACT,
    FAILS,
    IGNORED,
    COMMON,
    GDN,
    GDN_LAYER,
    HIDDEN,
    LAYER,
    REFUSED,
    UNWRAPPED,
    WRONG,
    Family,
    Fused,
)

_ALICE = "vllm.model_executor.models.alice_ai"

_QWEN4 = "vllm.models.qwen4_exp.nvidia.model"
_DEEPSEEK4 = "vllm.models.deepseek_v4.nvidia.model"
_K2 = "vllm.model_executor.models.k2_horizon"
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
                # At warm-up, by an entry for `conv1d`. Without it: exact, wrong, ignored, ignored.
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
                {f"{_GLM}.1.self_attn.indexer.wk": 128},
                (REFUSED,) * 4,
            ),
            # Served past the layer: the indexer keeps a float32 copy of these rows.
            Fused(
                "language_model.model.layers.1.self_attn.indexer.wk_weights_proj",
                {f"{_GLM}.1.self_attn.indexer.weights_proj": 4},
                (REFUSED,) * 4,
                plugin=REFUSED,
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
                Fused(
                    f"{GDN_LAYER}.in_proj_qkvz",
                    {f"{GDN_LAYER}.in_proj_qkv": 512, f"{GDN_LAYER}.in_proj_z": 256},
                    (REFUSED,) * 4,
                ),
                Fused(
                    f"{LAYER}.attn_hyper_connection.input_mix_weight_down_block_inject",
                    {
                        f"{LAYER}.attn_hyper_connection.input_mix_weight_down": lowrank,
                        f"{LAYER}.attn_hyper_connection.block_inject_weight": 4,
                    },
                    (*stock, IGNORED, IGNORED),
                    columns=4 * HIDDEN,
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
        # Padded to a multiple of 16 rows, as a third output that a phantom module stands for.
        for how, lowrank, stock in (
            ("padded", 16, (EXACT, EXACT)),
            ("without padding", 12, (REFUSED, REFUSED)),
        )
    ),
    *(
        Family(
            f"Step5, {kv_heads} KV heads",
            {
                "model_type": "step5",
                "architectures": ["Step5ForCausalLM"],
                "vocab_size": 128,
                "hidden_size": HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 32,
                "num_attention_groups": kv_heads,
                "head_dim": 128,
                "max_position_embeddings": 128,
                "moe_layers_enum": "",
                "use_head_wise_attn_gate": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "partial_rotary_factors": [1.0, 1.0],
                "sparse_config": {
                    "sparse_indexer_num_heads": 2 * kv_heads,
                    "index_tp_size": kv_heads,
                },
            },
            (
                *(
                    Fused(
                        f"{LAYER}.self_attn.qkvg_proj",
                        {
                            f"{LAYER}.self_attn.q_proj": 32 * 128,
                            f"{LAYER}.self_attn.k_proj": kv_heads * 128,
                            f"{LAYER}.self_attn.v_proj": kv_heads * 128,
                            f"{LAYER}.self_attn.g_proj": 32,
                        },
                        UNWRAPPED,
                    )
                    for _ in range(kv_heads // 8)
                ),
                Fused(
                    "model.layers.1.self_attn.qkv_indexer_proj",
                    {
                        "model.layers.1.self_attn.q_proj": 32 * 128,
                        "model.layers.1.self_attn.k_proj": kv_heads * 128,
                        "model.layers.1.self_attn.v_proj": kv_heads * 128,
                        "model.layers.1.self_attn.sparse_indexer_q": 2 * kv_heads * 256,
                        "model.layers.1.self_attn.sparse_indexer_k": 256,
                        "model.layers.1.self_attn.sparse_indexer_z": 256,
                        "model.layers.1.self_attn.g_proj": 32,
                    },
                    UNWRAPPED,
                ),
                Fused(
                    "model.layers.1.self_attn.sparse_indexer_w",
                    {"model.layers.1.self_attn.sparse_indexer_w": 2 * kv_heads},
                    UNWRAPPED,
                ),
            ),
            stubs=(
                "vllm.config.vllm.VllmConfig._validate_v1_model_runner",
                ("vllm.models.step5.nvidia.model.Attention", mock.MagicMock()),
                "vllm.models.step5.nvidia.model.Step5SparseAttention",
                ("vllm.platforms.cpu.CpuPlatform.get_device_capability", DeviceCapability(9, 0)),
            ),
            modules=("vllm.models.step5.nvidia.sparse_attention",),
            since="0.33.0",
        )
        for kv_heads in (8, 2)
    ),
    Family(
        "Inkling",
        {
            "model_type": "inkling_model",
            "architectures": ["InklingForCausalLM"],
            "vocab_size": 128,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "dense_mlp_idx": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 16,
            "d_rel": 4,
            "rel_extent": 16,
        },
        (
            Fused(
                f"{LAYER}.attn.qkvr",
                {
                    "model.llm.layers.0.attn.wq_du": 128,
                    "model.llm.layers.0.attn.wk_dv": 128,
                    "model.llm.layers.0.attn.wv_dv": 128,
                    "model.llm.layers.0.attn.wr_du": 32,
                },
                UNWRAPPED,
            ),
        ),
        stubs=(
            ("vllm.models.inkling.nvidia.model.InklingConvState", mock.MagicMock()),
            "vllm.models.inkling.nvidia.model.initialize_lamport_rs_conv",
        ),
        since="0.33.0",
    ),
    *(
        Family(
            name,
            {
                "architectures": [architecture],
                "text_config": {**GDN, "model_type": "qwen3_5_text"},
                **config,
            },
            (
                Fused(
                    "language_model.model.layers.0.linear_attn.in_proj_qkvz",
                    {
                        "model.language_model.layers.0.linear_attn.in_proj_qkv": 512,
                        "model.language_model.layers.0.linear_attn.in_proj_z": 256,
                    },
                    (REFUSED,) * 4,
                ),
                Fused(
                    "language_model.model.layers.0.linear_attn.in_proj_ba",
                    {
                        "model.language_model.layers.0.linear_attn.in_proj_b": 16,
                        "model.language_model.layers.0.linear_attn.in_proj_a": 16,
                    },
                    ALWAYS_EXACT,
                ),
            ),
            since=since,
        )
        for name, architecture, since, config in (
            (
                "Qwen3.5, multimodal",
                "Qwen3_5ForConditionalGeneration",
                "0.17.0",
                {
                    "model_type": "qwen3_5",
                    "vision_config": {
                        "model_type": "qwen3_5",
                        "depth": 1,
                        "hidden_size": 64,
                        "num_heads": 8,
                        "intermediate_size": 64,
                        "out_hidden_size": HIDDEN,
                    },
                },
            ),
            (
                "MiniCPM-V 4.6",
                "MiniCPMV4_6ForConditionalGeneration",
                "0.33.0",
                {
                    "model_type": "minicpmv4_6",
                    "vision_config": {
                        "model_type": "minicpmv4_6_vision",
                        "num_hidden_layers": 1,
                        "hidden_size": 64,
                        "num_attention_heads": 8,
                        "intermediate_size": 64,
                    },
                },
            ),
        )
    ),
    Family(
        "DeepSeek-V4",
        {
            **COMMON,
            "model_type": "deepseek_v4",
            "architectures": ["DeepseekV4ForCausalLM"],
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "layer_types": ["compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe"],
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "expert_dtype": "bf16",
            "q_lora_rank": 24,
            "o_lora_rank": 8,
            "o_groups": 8,
            "qk_rope_head_dim": 16,
            "head_dim": 512,
            "sliding_window": 16,
            "index_topk": 32,
            "index_head_dim": 128,
            "index_n_heads": 64,
            "hc_mult": 4,
        },
        (
            Fused(
                f"{LAYER}.attn.fused_wqa_wkv",
                {"layers.0.attn.wq_a": 24, "layers.0.attn.wkv": 512},
                ALWAYS_EXACT,
            ),
            *(
                Fused(
                    f"{LAYER}.attn.{compressor}.fused_wkv_wgate",
                    {
                        f"layers.0.attn.{compressor}.wkv": rows,
                        f"layers.0.attn.{compressor}.wgate": rows,
                    },
                    (IGNORED,) * 4,
                    plugin=REFUSED,
                    called=False,  # `torch.mm` on its weight, in attention.py
                )
                for compressor, rows in (("compressor", 1024), ("indexer.compressor", 256))
            ),
        ),
        stubs=(
            f"{_DEEPSEEK4}.DeepseekV4MoE",
            f"{_DEEPSEEK4}.DeepseekV4ForCausalLM.set_moe_parameters",
            (f"{_DEEPSEEK4}.DeepseekV4Model.get_expert_mapping", []),
            "torch.cuda.Stream",
            "torch.cuda.Event",
            ("vllm.platforms.cpu.CpuPlatform.get_device_capability", DeviceCapability(9, 0)),
        ),
        model_class=f"{_DEEPSEEK4}:DeepseekV4ForCausalLM",
        since="0.33.0",
    ),
    Family(
        "openPangu with sinks",
        {
            **COMMON,
            "model_type": "llama",  # its own configuration comes with the checkpoint
            "architectures": ["PanguEmbeddedForCausalLM"],
            "num_hidden_layers": 1,
            "qk_nope_dim": 8,
            "qk_rope_dim": 8,
            "v_channels": 32,
            "param_sink_number": 4,
            "rope_theta": 1e4,
            "n_routed_experts": None,
        },
        (
            Fused(
                f"{LAYER}.self_attn.qkv_proj",
                {
                    f"{LAYER}.self_attn.q_proj": 128,
                    f"{LAYER}.self_attn.k_proj": 128,
                    f"{LAYER}.self_attn.v_proj": 256,
                },
                UNWRAPPED,
                # For q, k and v by themselves the model's loader raises.
                stored_as=f"{LAYER}.self_attn.qkv_proj",
            ),
        ),
        stubs=(("vllm.model_executor.models.openpangu.StaticSinkAttention", mock.MagicMock()),),
    ),
    Family(
        "K2-Horizon",
        {
            **COMMON,
            "model_type": "qwen3_moe",  # its own configuration comes with the checkpoint
            "architectures": ["K2HorizonForCausalLM"],
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "num_experts": 8,
            "mova_num_experts": 2,
            "mova_num_experts_per_tok": 1,
            "moe_gate_bias": False,
            "router_score_func": "sigmoid",
            "router_scaling_factor": 1.0,
            "rope_head_dim": 8,
            "query_key_norm": True,
            "attention_bias": False,
            "attention_gate_func": None,
            "layernorm_num_groups": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        (
            Fused(
                f"{LAYER}.self_attn.qk_proj",
                {f"{LAYER}.self_attn.q_proj": 128, f"{LAYER}.self_attn.k_proj": 32},
                (WRONG,) * 4,
            ),
            Fused(
                "model.layers.1.self_attn.qkv_proj",
                {
                    "model.layers.1.self_attn.q_proj": 128,
                    "model.layers.1.self_attn.k_proj": 32,
                    "model.layers.1.self_attn.v_proj": 32,
                },
                (WRONG,) * 4,
            ),
            Fused(
                f"{LAYER}.self_attn.v_experts.1",
                {f"{LAYER}.self_attn.v_experts.1": 32},
                (IGNORED,) * 4,
                plugin=REFUSED,
                called=False,
            ),
        ),
        stubs=(
            f"{_K2}.K2HorizonSparseMoeBlock",
            f"{_K2}.K2HorizonModel.get_expert_mapping",
        ),
        since="0.33.0",
    ),
)
