"""Model families with fused projections: tiny configurations and the expected outcomes.

``python3 ci/readme.py`` generates the README's table from this one, and
``tests/models/test_families.py`` tests every line of it. Sizes are small and divisible by a
tensor-parallel size of 8.
"""

from __future__ import annotations

from support.families.attention import ATTENTION_FAMILIES
from support.families.delta import DELTA_FAMILIES
from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    EXACT,
    GDN,
    GDN_LAYER,
    HALVES,
    HIDDEN,
    IGNORED,
    LAYER,
    NEMOTRON_H,
    REFUSED,
    UNWRAPPED,
    VLLM,
    WRONG,
    Family,
    Fused,
)
from support.families.mla import MLA_FAMILIES
from support.families.other import OTHER_FAMILIES
from support.families.qwen3_5 import QWEN3_5_FAMILIES
from support.families.switched_on import SWITCHED_ON_FAMILIES
from support.families.wrapped import WRAPPED_FAMILIES


def _mamba2(layer: str, module: str, n_groups: int) -> Fused:
    # Rows of the outputs: gate 128, x 128, B 16 per group, C 16 per group, dt 8 (one per head).
    return Fused(
        layer,
        {module: 128 + 128 + 2 * 16 * n_groups + 8},
        (EXACT, WRONG, IGNORED, WRONG) if n_groups == 1 else UNWRAPPED,
        outputs=5,
    )


def _convolution(layer: str, n_groups: int) -> Fused:
    # Outputs x, B, C. The model's kernel reads the weight, so LoRA on the layer would have no effect.
    rows = 128 + 2 * 16 * n_groups
    return Fused(
        layer,
        {layer: rows},
        (IGNORED,) * 4,
        REFUSED,
        columns=4,
        called=False,
        loaded=False,
        outputs=3,
    )


FAMILIES = (
    *QWEN3_5_FAMILIES,
    Family(
        "Qwen3-Next",
        {
            **GDN,
            "model_type": "qwen3_next",
            "architectures": ["Qwen3NextForCausalLM"],
            "mlp_only_layers": [0, 1],
            "num_experts": 0,
            "decoder_sparse_step": 1,
        },
        (
            Fused(f"{GDN_LAYER}.in_proj_qkvz", {f"{GDN_LAYER}.in_proj_qkvz": 768}, HALVES),
            Fused(f"{GDN_LAYER}.in_proj_ba", {f"{GDN_LAYER}.in_proj_ba": 32}, HALVES),
        ),
        stubs=(f"{VLLM}.models.qwen3_next.Qwen3NextForCausalLM.set_moe_parameters",),
        since="0.18.0",
    ),
    Family(
        "OLMo hybrid",
        {**GDN, "model_type": "olmo_hybrid", "architectures": ["OlmoHybridForCausalLM"]},
        (
            Fused(
                f"{GDN_LAYER}.in_proj_qkvg",
                {
                    f"{GDN_LAYER}.q_proj": 128,
                    f"{GDN_LAYER}.k_proj": 128,
                    f"{GDN_LAYER}.v_proj": 256,
                    f"{GDN_LAYER}.g_proj": 256,
                },
                UNWRAPPED,
            ),
        ),
        stubs=(
            f"{VLLM}.layers.mamba.gdn.olmo_gdn_linear_attn.set_triton_allocator",
            f"{VLLM}.models.olmo_hybrid.set_triton_allocator",  # its path up to 0.21.0
        ),
        since="0.18.0",
    ),
    *(
        Family(
            f"Granite 4 hybrid, {n_groups} group{'s' * (n_groups > 1)}",
            {
                **COMMON,
                "model_type": "granitemoehybrid",
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "num_hidden_layers": 2,
                "layer_types": ["mamba", "attention"],
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 16,
                "mamba_n_groups": n_groups,
                "mamba_expand": 2,
                "mamba_d_conv": 4,
                "mamba_chunk_size": 16,
                "num_local_experts": 0,
                "shared_intermediate_size": 64,
                "embedding_multiplier": 1.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
                "position_embedding_type": "rope",
            },
            (
                _mamba2(f"{LAYER}.mamba.in_proj", f"{LAYER}.mamba.in_proj", n_groups),
                _convolution(f"{LAYER}.mamba.conv1d", n_groups),
                Fused(
                    f"{LAYER}.shared_mlp.input_linear",
                    {f"{LAYER}.shared_mlp.input_linear": 128},
                    ALWAYS_EXACT,
                    outputs=2,
                ),
            ),
        )
        for n_groups in (1, 8)
    ),
    Family(
        "Falcon-H1",
        {
            **COMMON,
            "model_type": "falcon_h1",
            "architectures": ["FalconH1ForCausalLM"],
            "num_hidden_layers": 1,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_ssm": 128,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 16,
        },
        (_mamba2(f"{LAYER}.mamba.mamba.in_proj", f"{LAYER}.mamba.in_proj", 1),),
    ),
    Family(
        "Nemotron-H",
        dict(NEMOTRON_H),
        (_mamba2(f"{LAYER}.mixer.in_proj", "backbone.layers.0.mixer.in_proj", 8),),
        since="0.20.0",  # before, transformers did not have it
    ),
    Family(
        "Bamba",
        {
            **COMMON,
            "model_type": "bamba",
            "architectures": ["BambaForCausalLM"],
            "num_hidden_layers": 2,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 16,
        },
        (
            _mamba2(f"{LAYER}.mamba.in_proj", f"{LAYER}.mamba.in_proj", 1),
            Fused(
                f"{LAYER}.feed_forward.gate_up_proj",
                {f"{LAYER}.feed_forward.gate_proj": 64, f"{LAYER}.feed_forward.up_proj": 64},
                (WRONG,) * 4,
            ),
        ),
        until="0.23.0",
    ),
    Family(
        "Jamba",
        {
            **COMMON,
            "model_type": "jamba",
            "architectures": ["JambaForCausalLM"],
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 8,
            "expert_layer_offset": 7,
            "num_experts": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
        },
        (
            Fused(
                f"{LAYER}.mamba.in_proj",
                {f"{LAYER}.mamba.in_proj": 256},
                ALWAYS_EXACT,
                outputs=2,
            ),
        ),
    ),
    Family(
        "LFM2",
        {
            **COMMON,
            "model_type": "lfm2",
            "architectures": ["Lfm2ForCausalLM"],
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "block_ff_dim": 64,
            "block_dim": HIDDEN,
            "conv_dim": HIDDEN,
            "conv_L_cache": 3,
        },
        (
            Fused(
                f"{LAYER}.short_conv.in_proj",
                {f"{LAYER}.conv.in_proj": 192},
                UNWRAPPED,
                outputs=3,
            ),
        ),
    ),
    *ATTENTION_FAMILIES,
    *DELTA_FAMILIES,
    *MLA_FAMILIES,
    *OTHER_FAMILIES,
    *SWITCHED_ON_FAMILIES,
    *WRAPPED_FAMILIES,
)
