"""Families whose classes lack vLLM's flags for LoRA, so that stock vLLM refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.families.family import COMMON, FAILS, HIDDEN, LAYER, VLLM, Family, Fused, StubExperts
from support.families.mla import MLA, MLA_STUBS, down_projection
from support.families.wrapped import StubTower

#: On CPU, with tensor parallelism, vLLM's LoRA on q, k and v fails in 0.20.0 to 0.24.0 (the defect
#: "gathered-when-whole"), with any model.
_QKV_SINCE = "0.25.0"
#: Stock vLLM does not start with LoRA on them.
_REFUSED_BY_STOCK = (FAILS,) * 4
_MAMBA: Mapping[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "intermediate_size": 128,
    "time_step_rank": 8,
    "tie_word_embeddings": True,
}
_TWO_KINDS: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
}


def _qkv(
    attention: str, rows: tuple[int, int, int] = (128,) * 3, columns: int = HIDDEN, layer: str = ""
) -> Fused:
    """Return the query, key and value projection of an attention, given each one's rows."""
    modules = {f"{attention}.{part}_proj": of for part, of in zip("qkv", rows, strict=True)}
    return Fused(f"{layer or attention}.qkv_proj", modules, _REFUSED_BY_STOCK, columns=columns)


def _gate_up(mlp: str, columns: int = HIDDEN, layer: str = "") -> Fused:
    """Return the gate and up projection of a feed-forward network."""
    modules = {f"{mlp}.gate_proj": 64, f"{mlp}.up_proj": 64}
    return Fused(f"{layer or mlp}.gate_up_proj", modules, _REFUSED_BY_STOCK, columns=columns)


def _whole(path: str, rows: int, outputs: int, columns: int = HIDDEN, layer: str = "") -> Fused:
    """Return a fused projection that a checkpoint has as one module."""
    return Fused(layer or path, {path: rows}, _REFUSED_BY_STOCK, columns=columns, outputs=outputs)


_GEMMA3N: Mapping[str, Any] = {
    **COMMON,
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "altup_active_idx": 0,
    "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "tie_word_embeddings": True,
}
_TOWER: Mapping[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "patch_size": 14,
}
_SIGLIP: Mapping[str, Any] = {**_TOWER, "model_type": "siglip_vision_model", "image_size": 28}
_QWEN2: Mapping[str, Any] = {**COMMON, "model_type": "qwen2", "num_hidden_layers": 1}
_KIMI_TEXT: Mapping[str, Any] = {**MLA, "model_type": "deepseek_v3"}

_KIMI_LINEAR: Mapping[str, Any] = {
    **COMMON,
    "model_type": "kimi_linear",
    "architectures": ["KimiLinearForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "num_experts": None,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 2,
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "head_dim": 16,
        "num_heads": 8,
        "short_conv_kernel_size": 4,
    },
}

SWITCHED_ON_FAMILIES = (
    Family(
        "Gemma 3n",
        {**_GEMMA3N, "architectures": ["Gemma3nForCausalLM"]},
        (_qkv(f"{LAYER}.self_attn"), _gate_up(f"{LAYER}.mlp")),
        since=_QKV_SINCE,
    ),
    Family(
        "Gemma 3n, multimodal",
        {
            "model_type": "gemma3n",
            "architectures": ["Gemma3nForConditionalGeneration"],
            "text_config": _GEMMA3N,
            "vision_config": {"model_type": "gemma3n_vision", "hidden_size": 64},
            "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 64},
        },
        (
            _qkv(
                "model.language_model.layers.0.self_attn", layer=f"language_model.{LAYER}.self_attn"
            ),
            _gate_up("model.language_model.layers.0.mlp", layer=f"language_model.{LAYER}.mlp"),
        ),
        replaced={f"{VLLM}.models.gemma3n_mm.AutoModel.from_config": lambda **_: StubTower()},
        since=_QKV_SINCE,
    ),
    Family(
        "Kimi K2.5",
        {
            "model_type": "kimi_k25",
            "architectures": ["KimiK25ForConditionalGeneration"],
            "text_config": _KIMI_TEXT,
            "vision_config": {
                **_TOWER,
                "vt_num_hidden_layers": 1,
                "vt_hidden_size": 64,
                "vt_num_attention_heads": 8,
                "vt_intermediate_size": 64,
                "mm_hidden_size": 64,
                "text_hidden_size": HIDDEN,
            },
            "image_token_id": 5,
        },
        (
            down_projection(f"language_model.{LAYER}.self_attn", _REFUSED_BY_STOCK),
            _gate_up(f"language_model.{LAYER}.mlp"),
        ),
        stubs=MLA_STUBS,
    ),
    Family(
        "Kimi-VL",
        {
            "model_type": "kimi_vl",
            "architectures": ["KimiVLForConditionalGeneration"],
            "text_config": {**_KIMI_TEXT, "q_lora_rank": None},
            "vision_config": {**_TOWER, "merge_kernel_size": [2, 2]},
        },
        (_gate_up(f"language_model.{LAYER}.mlp"),),
        stubs=MLA_STUBS,
    ),
    Family(
        "Kimi-Linear",
        _KIMI_LINEAR,
        (
            Fused(
                f"{LAYER}.self_attn.in_proj_qkvgfab",
                {
                    **{f"{LAYER}.self_attn.{part}_proj": 128 for part in "qkv"},
                    f"{LAYER}.self_attn.b_proj": 8,
                    f"{LAYER}.self_attn.f_a_proj": 16,
                },
                _REFUSED_BY_STOCK,
            ),
            _gate_up(f"{LAYER}.mlp"),
        ),
        stubs=("torch.cuda.Stream", "torch.cuda.Event"),
        since="0.33.0",  # its file imports a package for GPUs in 0.32.0
    ),
    Family(
        "Kimi-Linear, each module a layer",
        _KIMI_LINEAR,
        (_gate_up(f"{LAYER}.mlp"),),
        stubs=MLA_STUBS,
        until="0.26.0",
    ),
    Family(
        "Ling 2.5, Ring 2.5",
        {
            **MLA,
            "model_type": "published",
            "architectures": ["BailingMoeV2_5ForCausalLM"],
            "num_hidden_layers": 2,
            "num_experts": 0,
            "num_shared_experts": 0,
            "layer_group_size": 2,
            "first_k_dense_replace": 2,
            "use_qk_norm": True,
            "group_norm_size": 8,
            "partial_rotary_factor": 0.5,
            "rotary_dim": 8,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "linear_silu": False,
            "use_bias": False,
            "use_qkv_bias": False,
            "score_function": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        (
            _whole(f"{LAYER}.self_attn.query_key_value", 3 * 128, 3),
            _gate_up(f"{LAYER}.mlp"),
            down_projection("model.layers.1.self_attn", _REFUSED_BY_STOCK),
        ),
        stubs=MLA_STUBS,
    ),
    Family(
        "MiMo-V2-Flash",
        {
            **COMMON,
            "model_type": "published",
            "architectures": ["MiMoV2FlashForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_act": "silu",
            "n_routed_experts": 4,
            "moe_layer_freq": [0, 0],
            "hybrid_layer_pattern": [0, 1],
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "layernorm_epsilon": 1e-6,
            "swa_num_attention_heads": 8,
            "swa_num_key_value_heads": 8,
            "swa_head_dim": 16,
            "swa_v_head_dim": 8,
            "v_head_dim": 8,
            "sliding_window": 16,
            "sliding_window_size": 16,
            "attention_bias": False,
            "rope_theta": 1e4,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "add_swa_attention_sink_bias": False,
            "add_full_attention_sink_bias": False,
            "attention_value_scale": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_shared_experts": None,
            "routed_scaling_factor": 1.0,
        },
        (_qkv(f"{LAYER}.self_attn", (128, 128, 64)), _gate_up(f"{LAYER}.mlp")),
    ),
    Family(
        "Step-3.5",
        {
            **COMMON,
            **_TWO_KINDS,
            "model_type": "published",
            "architectures": ["Step3p5ForCausalLM"],
            "num_nextn_predict_layers": 0,
            "num_attention_groups": 8,
            "moe_layers_enum": "1",
            "moe_num_experts": 4,
            "moe_intermediate_size": 32,
            "moe_top_k": 2,
            "share_expert_dim": 32,
            "use_head_wise_attn_gate": True,
            "moe_router_scaling_factor": 1.0,
            "norm_expert_weight": True,
            "att_impl_type": "GQA",
            "attention_other_setting": None,
            "need_fp32_gate": True,
            "use_moe_router_bias": True,
            "swiglu_limits": None,
            "swiglu_limits_shared": None,
            "rope_theta": 1e4,
        },
        (_qkv(f"{LAYER}.self_attn"), _gate_up(f"{LAYER}.mlp")),
        replaced={f"{VLLM}.models.step3p5.FusedMoEBlock": StubExperts},
        since=_QKV_SINCE,
    ),
    Family(
        "GPT-2",
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 128,
            "n_embd": HIDDEN,
            "n_layer": 1,
            "n_head": 8,
            "n_positions": 128,
            "activation_function": "relu",
        },
        (_whole("transformer.h.0.attn.c_attn", 3 * HIDDEN, 3),),
        transposed=True,
    ),
    Family(
        "GPT-J",
        {
            "model_type": "gptj",
            "architectures": ["GPTJForCausalLM"],
            "vocab_size": 128,
            "n_embd": 128,
            "n_layer": 1,
            "n_head": 8,
            "n_positions": 128,
            "rotary_dim": 16,
            "activation_function": "relu",
        },
        (_qkv("transformer.h.0.attn", columns=128),),
        since=_QKV_SINCE,
    ),
    Family(
        "Falcon",
        {
            "vocab_size": 128,
            "num_attention_heads": 8,
            "max_position_embeddings": 128,
            "model_type": "falcon",
            "architectures": ["FalconForCausalLM"],
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
        },
        (_whole("transformer.h.0.self_attention.query_key_value", 3 * 128, 3, 128),),
    ),
    Family(
        "StableLM",
        {
            **COMMON,
            "model_type": "stablelm",
            "architectures": ["StableLmForCausalLM"],
            "hidden_size": 128,
            "num_hidden_layers": 1,
        },
        (
            _qkv(f"{LAYER}.self_attn", columns=128),
            _gate_up(f"{LAYER}.mlp", columns=128),
        ),
        since=_QKV_SINCE,
    ),
    Family(
        "Orion",
        {
            **COMMON,
            "model_type": "published",
            "architectures": ["OrionForCausalLM"],
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rope_theta": 1e4,
        },
        (
            _qkv(f"{LAYER}.self_attn", columns=128),
            _gate_up(f"{LAYER}.mlp", columns=128),
        ),
        since=_QKV_SINCE,
    ),
    Family(
        "Mamba, Falcon-Mamba",
        {**_MAMBA, "model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        (_whole("backbone.layers.0.mixer.in_proj", 256, 2),),
    ),
    Family(
        "Mamba 2",
        {
            **_MAMBA,
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "num_heads": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
        (_whole("backbone.layers.0.mixer.in_proj", 128 + 128 + 2 * 16 + 8, 5),),
    ),
    Family(
        "Zamba 2",
        {
            **COMMON,
            "model_type": "zamba2",
            "architectures": ["Zamba2ForCausalLM"],
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 8,
            "use_shared_attention_adapter": True,
        },
        (
            _whole(
                f"{LAYER}.mamba.in_proj",
                128 + 128 + 2 * 16 + 8,
                5,
            ),
            _whole(
                "model.layers.1.shared_transformer.feed_forward.gate_up_proj",
                128,
                2,
            ),
        ),
    ),
    Family(
        "HRM",
        {
            **COMMON,
            "model_type": "hrm_text",
            "architectures": ["HrmTextForCausalLM"],
            "num_hidden_layers": 1,
            "num_layers_per_stack": 1,
            "H_cycles": 1,
            "L_cycles": 1,
        },
        (
            _whole(
                "model.H_module.layers.0.attn.gqkv_proj",
                4 * 128,
                4,
                layer="model.H_module.layers.0.self_attn.gqkv_proj",
            ),
            _whole("model.L_module.layers.0.mlp.gate_up_proj", 128, 2),
        ),
    ),
    Family(
        "Cohere 2 MoE",
        {
            **COMMON,
            **_TWO_KINDS,
            "model_type": "cohere2_moe",
            "architectures": ["Cohere2MoeForCausalLM"],
            "first_k_dense_replace": 2,
        },
        (_qkv(f"{LAYER}.self_attn"), _gate_up(f"{LAYER}.mlp")),
        since=_QKV_SINCE,
    ),
    Family(
        "IQuest LoopCoder",
        {
            **COMMON,
            "model_type": "published",
            "architectures": ["IQuestLoopCoderForCausalLM"],
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rope_theta": 1e4,
            "loop_num": 2,
            "loop_window_size": 16,
        },
        (_qkv(f"{LAYER}.self_attn", (64, 64, 64)), _gate_up(f"{LAYER}.mlp")),
        since=_QKV_SINCE,
    ),
    *(
        Family(
            name,
            {"model_type": model_type, "architectures": [architecture], **config},
            (
                _qkv(
                    f"{prefix}.layers.0.self_attn",
                    # Qwen2's heads have the width of its hidden states.
                    (64 if config["text_config"] is _QWEN2 else 128,) * 3,
                    layer=f"language_model.{LAYER}.self_attn",
                ),
                _gate_up(f"{prefix}.layers.0.mlp", layer=f"language_model.{LAYER}.mlp"),
            ),
            since=_QKV_SINCE,
        )
        for name, model_type, architecture, prefix, config in (
            (
                "LLaVA-OneVision",
                "llava_onevision",
                "LlavaOnevisionForConditionalGeneration",
                "model.language_model",
                {"text_config": _QWEN2, "vision_config": _SIGLIP},
            ),
            (
                "PaddleOCR-VL",
                "paddleocr_vl",
                "PaddleOCRVLForConditionalGeneration",
                "model",
                {
                    "text_config": {**COMMON, "num_hidden_layers": 1},
                    "vision_config": {**_TOWER, "image_size": 28},
                },
            ),
            (
                "Qwen2-Audio",
                "qwen2_audio",
                "Qwen2AudioForConditionalGeneration",
                "language_model.model",
                {
                    "text_config": _QWEN2,
                    "audio_config": {
                        "d_model": 64,
                        "encoder_layers": 1,
                        "encoder_attention_heads": 8,
                        "encoder_ffn_dim": 64,
                    },
                },
            ),
            (
                "Command A Vision",
                "cohere2_vision",
                "Cohere2VisionForConditionalGeneration",
                "model.language_model",
                {
                    "text_config": {**COMMON, "model_type": "cohere2", "num_hidden_layers": 1},
                    "vision_config": _SIGLIP,
                },
            ),
        )
    ),
    Family(
        "DBRX",
        {
            "model_type": "dbrx",
            "architectures": ["DbrxForCausalLM"],
            "vocab_size": 128,
            "d_model": 128,
            "n_heads": 8,
            "n_layers": 1,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": None, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        (_whole("transformer.blocks.0.norm_attn_norm.attn.Wqkv", 3 * 128, 3, 128),),
        replaced={f"{VLLM}.models.dbrx.DbrxMoE": StubExperts},
    ),
)
