"""Families with fused projections in their attention other than the usual QKV."""

from __future__ import annotations

from unittest import mock

from vllm.platforms.interface import DeviceCapability

from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    EXACT,
    HIDDEN,
    IGNORED,
    LAYER,
    REFUSED,
    UNWRAPPED,
    WRONG,
    Family,
    Fused,
)

_DEEPSEEK4 = "vllm.models.deepseek_v4.nvidia.model"
_K2 = "vllm.model_executor.models.k2_horizon"
_DEEPSEEK41 = "vllm.models.deepseek_v41.nvidia.model"

ATTENTION_FAMILIES = (
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
            "num_hidden_layers": 2,
            "dense_mlp_idx": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 16,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "shared_expert_sink": True,
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
            # A checkpoint stores both in one tensor, with interleaved rows and for all experts. No
            # LoRA module matches that tensor, and no layer has the name of a module.
            Fused(
                "model.layers.1.mlp.sink_experts.w13",
                {
                    "model.llm.layers.1.mlp.shared_experts.w1": 128,
                    "model.llm.layers.1.mlp.shared_experts.w3": 128,
                },
                (IGNORED,) * 4,
                plugin=REFUSED,
                loaded=False,
            ),
        ),
        stubs=(
            ("vllm.models.inkling.nvidia.moe.FusedMoEFactory", mock.MagicMock()),
            ("vllm.models.inkling.nvidia.moe.InklingMoE.finalize_load", ()),
            "vllm.models.inkling.nvidia.moe.aux_stream",
            "torch.cuda.Event",
            ("vllm.models.inkling.nvidia.model.InklingConvState", mock.MagicMock()),
            "vllm.models.inkling.nvidia.model.initialize_lamport_rs_conv",
        ),
        since="0.33.0",
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
        classes={"DeepseekV4ForCausalLM": f"{_DEEPSEEK4}:DeepseekV4ForCausalLM"},
        since="0.33.0",
    ),
    Family(
        "openPangu with sinks",
        {
            **COMMON,
            "model_type": "llama",  # checkpoints bring their own configuration class
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
                # The model's loader raises if q, k and v are stored separately.
                stored_as=f"{LAYER}.self_attn.qkv_proj",
            ),
        ),
        stubs=(("vllm.model_executor.models.openpangu.StaticSinkAttention", mock.MagicMock()),),
        since="0.32.0",
    ),
    Family(
        "K2-Horizon",
        {
            **COMMON,
            "model_type": "qwen3_moe",  # checkpoints bring their own configuration class
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
    Family(
        "DeepSeek-V4.1",
        {
            "model_type": "deepseek_v41",
            "architectures": ["DeepseekV41LLMForCausalLM"],
            "text_config": {
                **COMMON,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "compress_ratios": [2, 1],
                "kv_source_layer_ids": [0, 1],
                "index_source_layer_ids": [0, 1],
                "compress_rope_theta": 1e4,
                "rope_theta": 1e4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 32,
                "num_hash_layers": 0,
                "scoring_func": "sqrtsoftplus",
                "swiglu_limit": 10.0,
                "expert_dtype": "bf16",
                "q_lora_rank": 24,
                "o_lora_rank": 8,
                "o_groups": 8,
                "qk_rope_head_dim": 64,
                "head_dim": 512,
                "sliding_window": 16,
                "index_topk": 32,
                "index_head_dim": 128,
                "index_n_heads": 64,
                "hc_mult": 4,
                "hc_eps": 1e-6,
                "hc_sinkhorn_iters": 1,
            },
        },
        (
            Fused(
                f"{LAYER}.attn.fused_wqa_wkv",
                {"layers.0.attn.wq_a": 24, "layers.0.attn.wkv": 512},
                ALWAYS_EXACT,
            ),
            *(
                Fused(
                    f"model.layers.{layer}.attn.compressor.fused_wkv_wgate",
                    {f"layers.{layer}.attn.compressor.{module}": 512 for module in modules},
                    (IGNORED,) * 4,
                    # Without a gate, the layer has one output, and the model's class lists two modules.
                    plugin=EXACT if "wgate" in modules else REFUSED,
                    called=False,
                )
                for layer, modules in ((0, ("wkv", "wgate")), (1, ("wkv",)))
            ),
        ),
        stubs=(
            f"{_DEEPSEEK41}.DeepseekV4MoE",
            f"{_DEEPSEEK41}.DeepseekV41LLMForCausalLM.set_moe_parameters",
            (f"{_DEEPSEEK41}.DeepseekV4Model.get_expert_mapping", []),
            "torch.cuda.Stream",
            "torch.cuda.Event",
            ("vllm.platforms.cpu.CpuPlatform.get_device_capability", DeviceCapability(9, 0)),
        ),
        classes={"DeepseekV41LLMForCausalLM": f"{_DEEPSEEK41}:DeepseekV41LLMForCausalLM"},
        since="0.33.0",
    ),
    Family(
        "Llama 4",
        {
            **COMMON,
            "model_type": "llama4_text",
            "architectures": ["Llama4ForCausalLM"],
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 0,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 32,
        },
        (
            Fused(
                f"{LAYER}.self_attn.qkv_proj",
                {
                    f"{LAYER}.self_attn.q_proj": 128,
                    f"{LAYER}.self_attn.k_proj": 32,
                    f"{LAYER}.self_attn.v_proj": 32,
                },
                (WRONG,) * 4,
            ),
        ),
    ),
    Family(
        "Gemma 4, k_proj for K and V (31B, 26B-A4B)",
        {
            **COMMON,
            "model_type": "gemma4_text",
            "architectures": ["Gemma4ForCausalLM"],
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "num_global_key_value_heads": 8,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "sliding_window": 64,
        },
        (
            Fused(
                "model.layers.1.self_attn.qkv_proj",
                {
                    "model.layers.1.self_attn.q_proj": 128,
                    "model.layers.1.self_attn.k_proj": 128,
                },
                (WRONG,) * 4,
                outputs=3,
            ),
        ),
        since="0.20.2",
    ),
)
