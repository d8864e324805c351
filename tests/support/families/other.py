"""Families around a text model, on the Transformers backend, or with two equal outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    EXACT,
    HIDDEN,
    IGNORED,
    LAYER,
    NO_ATTENTION,
    UNWRAPPED,
    VLLM,
    WRONG,
    Family,
    Fused,
    StubExperts,
)

_LFM2: Mapping[str, Any] = {
    **COMMON,
    "model_type": "lfm2",
    "architectures": ["Lfm2ForCausalLM"],
    "num_hidden_layers": 2,
    "layer_types": ["conv", "full_attention"],
    "block_ff_dim": 64,
    "block_dim": HIDDEN,
    "conv_dim": HIDDEN,
    "conv_L_cache": 3,
}
_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "patch_size": 2,
    "image_size": 8,
    "num_patches": 16,
}


OTHER_FAMILIES = (
    Family(
        "LFM2-MoE",
        {
            **_LFM2,
            "model_type": "lfm2_moe",
            "architectures": ["Lfm2MoeForCausalLM"],
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "use_expert_bias": True,
        },
        (
            Fused(
                f"{LAYER}.short_conv.in_proj",
                {f"{LAYER}.conv.in_proj": 192},
                UNWRAPPED,
                outputs=3,
            ),
        ),
        replaced={f"{VLLM}.models.lfm2_moe.Lfm2MoeSparseMoeBlock": StubExperts},
    ),
    Family(
        "LFM2-VL",
        {
            "model_type": "lfm2_vl",
            "architectures": ["Lfm2VlForConditionalGeneration"],
            "text_config": _LFM2,
            "vision_config": {**_VISION, "model_type": "siglip2_vision_model"},
            "projector_hidden_size": 32,
            "projector_use_layernorm": True,
        },
        (
            Fused(
                f"language_model.{LAYER}.short_conv.in_proj",
                {"model.language_model.layers.0.conv.in_proj": 192},
                (IGNORED,) * 4,
                outputs=3,
            ),
        ),
    ),
    Family(
        "PLaMo 2",
        # transformers has no class for its configuration; any class that keeps unknown fields works.
        {
            **COMMON,
            "model_type": "llama",
            "architectures": ["Plamo2ForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size_per_head": 16,
            "mamba_num_heads": 8,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 16,
            "mamba_step": 2,
            "mamba_enabled": True,
            "layers_block_type": ["mamba", "attention"],
        },
        (
            Fused(
                "model.layers.layers.0.mixer.in_proj",
                {"model.layers.layers.0.mixer.in_proj": 256},
                (WRONG,) * 4,
                outputs=2,
            ),
        ),
        until="0.26.0",
    ),
    Family(
        "Whisper",
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "vocab_size": 128,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "decoder_start_token_id": 0,
            "d_model": HIDDEN,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 64,
            "max_target_positions": 64,
        },
        (
            Fused(
                "model.decoder.layers.0.encoder_attn.kv_proj",
                {
                    "model.decoder.layers.0.encoder_attn.k_proj": 64,
                    "model.decoder.layers.0.encoder_attn.v_proj": 64,
                },
                ALWAYS_EXACT,
            ),
        ),
        since="0.18.0",
    ),
    Family(
        "Transformers backend, two merged layers",
        {
            **COMMON,
            "model_type": "recurrent_gemma",
            "architectures": ["TransformersForCausalLM"],
            "num_hidden_layers": 1,
            "lru_width": 64,
            "block_types": ["recurrent"],
            "attention_window_size": 64,
        },
        (
            Fused(
                f"{LAYER}.temporal_block.merged_proj_8_linear_y_8_linear_x",
                {
                    f"{LAYER}.temporal_block.linear_y": 64,
                    f"{LAYER}.temporal_block.linear_x": 64,
                },
                ALWAYS_EXACT,
            ),
        ),
        stubs=NO_ATTENTION,
        since="0.33.0",
    ),
    *(
        Family(
            f"Transformers backend, four merged layers{around}",
            {
                **COMMON,
                **config,
                "architectures": ["TransformersForCausalLM"],
                "num_hidden_layers": 1,
            },
            (
                Fused(
                    f"{LAYER}.self_attn.{merged}",
                    {f"{LAYER}.self_attn.{module}": rows for module, rows in modules.items()},
                    UNWRAPPED,
                ),
            ),
            stubs=NO_ATTENTION,
            since="0.32.0",
        )
        for around, config, merged, modules in (
            (
                " (gated attention)",
                {"model_type": "afmoe", "num_dense_layers": 1, "num_experts": 0},
                "merged_proj_6_q_proj_6_k_proj_6_v_proj_9_gate_proj",
                {"q_proj": 128, "k_proj": 128, "v_proj": 128, "gate_proj": 128},
            ),
            (
                " (unequal)",
                {
                    "model_type": "inkling_text",
                    "layer_types": ["hybrid"],
                    "mlp_layer_types": ["dense"],
                    "d_rel": 4,
                },
                "merged_proj_6_q_proj_6_k_proj_6_v_proj_6_r_proj",
                {"q_proj": 128, "k_proj": 128, "v_proj": 128, "r_proj": 32},
            ),
        )
    ),
    Family(
        "Granite MoE shared",
        {
            **COMMON,
            "model_type": "granitemoeshared",
            "architectures": ["GraniteMoeSharedForCausalLM"],
            "num_hidden_layers": 1,
            "shared_intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        (
            Fused(
                f"{LAYER}.shared_mlp.input_linear",
                {f"{LAYER}.shared_mlp.input_linear": 128},
                (IGNORED,) * 4,
                outputs=2,
            ),
        ),
        stubs=(f"{VLLM}.models.granitemoeshared.GraniteMoeMoE",),
    ),
    Family(
        "Granite Speech around a hybrid text model",
        {
            "model_type": "granite_speech",
            "architectures": ["GraniteSpeechForConditionalGeneration"],
            "text_config": {
                **COMMON,
                "model_type": "granitemoehybrid",
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "num_hidden_layers": 1,
                "layer_types": ["mamba"],
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 16,
                "mamba_n_groups": 1,
                "mamba_expand": 2,
                "mamba_d_conv": 4,
                "mamba_chunk_size": 16,
                "num_local_experts": 0,
                "shared_intermediate_size": 64,
                "position_embedding_type": "rope",
            },
            "encoder_config": {
                "model_type": "granite_speech_encoder",
                "num_layers": 1,
                "input_dim": 8,
                "hidden_dim": 32,
                "output_dim": 64,  # published: 42, which four ranks cannot divide equally
                "num_heads": 8,
                "dim_head": 4,
                "context_size": 8,
                "max_pos_emb": 8,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 8,
                "intermediate_size": 32,
                "encoder_hidden_size": 32,
            },
            "audio_token_index": 127,
        },
        (
            Fused(
                f"language_model.{LAYER}.shared_mlp.input_linear",
                {f"language_model.{LAYER}.shared_mlp.input_linear": 128},
                (IGNORED,) * 4,
                outputs=2,
            ),
            Fused(
                f"language_model.{LAYER}.mamba.in_proj",
                {f"language_model.{LAYER}.mamba.in_proj": 128 + 128 + 2 * 16 + 8},
                (EXACT, WRONG, IGNORED, WRONG),
                outputs=5,
            ),
        ),
    ),
    Family(
        "ModernBERT",
        {
            **COMMON,
            "model_type": "modernbert",
            "architectures": ["ModernBertModel"],
            "num_hidden_layers": 1,
        },
        (
            Fused(
                "encoder_layer.layers.0.mlp.Wi",
                {f"{LAYER}.mlp.Wi": 128},
                ALWAYS_EXACT,
                outputs=2,
            ),
        ),
        since="0.32.0",
    ),
    Family(
        "ChatGLM",
        {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "num_layers": 1,
            "padded_vocab_size": 128,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 64,
            "kv_channels": 16,
            "num_attention_heads": 8,
            "seq_length": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 8,
            "add_qkv_bias": False,
            "rmsnorm": True,
            "original_rope": True,
            "tie_word_embeddings": False,
        },
        (
            Fused(
                "transformer.encoder.layers.0.mlp.dense_h_to_4h",
                {"transformer.encoder.layers.0.mlp.dense_h_to_4h": 128},
                ALWAYS_EXACT,
                outputs=2,
            ),
        ),
    ),
)
