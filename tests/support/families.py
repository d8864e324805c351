"""Model families with fused projections: tiny configurations, and what is expected of each.

The table in the README is made from this one (``python3 ci/readme.py``), and ``tests/families``
holds every line of it. Sizes are small, and divide by a tensor-parallel size of 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACT, WRONG, IGNORED, REFUSED, FAILS = "exact", "wrong", "ignored", "refused", "fails"
HIDDEN = 64


@dataclass(frozen=True)
class Fused:
    """One fused projection of a family.

    Attributes:
        layer: its path in vLLM's model.
        modules: adapter-visible module's path in a checkpoint -> rows of its weight.
        stock: what stock vLLM makes of adapters on it, of 0.29.0 to 0.33.0: at TP 1, at TP > 1, and
            both again under ``fully_sharded_loras``.
        plugin: what this package makes of them.
        columns: width of its input.
    """

    layer: str
    modules: Mapping[str, int]
    stock: tuple[str, str, str, str]
    plugin: str = EXACT
    columns: int = HIDDEN


@dataclass(frozen=True)
class Family:
    """One model class with a tiny configuration.

    Attributes:
        name: what the README calls it, with the models that share its layers.
        config: of the checkpoint, ``config.json``.
        fused: its fused projections.
        stubs: functions, by their paths, that do nothing while the model is built: what needs a MoE
            layer (LoRA on one needs Triton) or a GPU.
        since: the first release that has it, as vLLM has it now.
        sizes: tensor-parallel sizes that the model can be built for.
    """

    name: str
    config: Mapping[str, Any]
    fused: tuple[Fused, ...]
    stubs: tuple[str, ...] = ()
    since: str = "0.17.0"
    until: str | None = None
    sizes: tuple[int, ...] = (1, 2, 4, 8)


ALWAYS_EXACT = (EXACT,) * 4
#: One module over one output, or over unequal ones: cut into two halves at TP > 1.
HALVES = (EXACT, WRONG, EXACT, WRONG)
#: Three outputs or more, seen as one module or as three or more: not wrapped when fully sharded.
UNWRAPPED = (EXACT, EXACT, IGNORED, IGNORED)

_COMMON: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_GDN: Mapping[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
_VLLM = "vllm.model_executor"
_LAYER = "model.layers.0"
_GDN_LAYER = f"{_LAYER}.linear_attn"


def _mamba2(layer: str, module: str, n_groups: int) -> Fused:
    # Outputs gate, x, B, C, dt: 128, 128, 16 per group and again, 8 heads.
    return Fused(
        layer,
        {module: 128 + 128 + 2 * 16 * n_groups + 8},
        (EXACT, WRONG, IGNORED, WRONG) if n_groups == 1 else UNWRAPPED,
    )


FAMILIES = (
    Family(
        "Qwen3.5, Qwen3.6 and all with its gated delta net",
        {**_GDN, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
        (
            Fused(
                f"{_GDN_LAYER}.in_proj_qkvz",
                {f"{_GDN_LAYER}.in_proj_qkv": 512, f"{_GDN_LAYER}.in_proj_z": 256},
                (REFUSED,) * 4,
            ),
            Fused(
                f"{_GDN_LAYER}.in_proj_ba",
                {f"{_GDN_LAYER}.in_proj_b": 16, f"{_GDN_LAYER}.in_proj_a": 16},
                ALWAYS_EXACT,
            ),
        ),
    ),
    Family(
        "Qwen3-Next",
        {
            **_GDN,
            "model_type": "qwen3_next",
            "architectures": ["Qwen3NextForCausalLM"],
            "mlp_only_layers": [0, 1],
            "num_experts": 0,
            "decoder_sparse_step": 1,
        },
        (
            Fused(f"{_GDN_LAYER}.in_proj_qkvz", {f"{_GDN_LAYER}.in_proj_qkvz": 768}, HALVES),
            Fused(f"{_GDN_LAYER}.in_proj_ba", {f"{_GDN_LAYER}.in_proj_ba": 32}, HALVES),
        ),
        stubs=(f"{_VLLM}.models.qwen3_next.Qwen3NextForCausalLM.set_moe_parameters",),
        since="0.18.0",
    ),
    Family(
        "OLMo hybrid",
        {**_GDN, "model_type": "olmo_hybrid", "architectures": ["OlmoHybridForCausalLM"]},
        (
            Fused(
                f"{_GDN_LAYER}.in_proj_qkvg",
                {
                    f"{_GDN_LAYER}.q_proj": 128,
                    f"{_GDN_LAYER}.k_proj": 128,
                    f"{_GDN_LAYER}.v_proj": 256,
                    f"{_GDN_LAYER}.g_proj": 256,
                },
                UNWRAPPED,
            ),
        ),
        stubs=(f"{_VLLM}.layers.mamba.gdn.olmo_gdn_linear_attn.set_triton_allocator",),
        since="0.18.0",
    ),
    *(
        Family(
            f"Granite 4 hybrid, {n_groups} group{'s' * (n_groups > 1)}",
            {
                **_COMMON,
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
                _mamba2(f"{_LAYER}.mamba.in_proj", f"{_LAYER}.mamba.in_proj", n_groups),
                Fused(
                    f"{_LAYER}.shared_mlp.input_linear",
                    {f"{_LAYER}.shared_mlp.input_linear": 128},
                    ALWAYS_EXACT,
                ),
            ),
        )
        for n_groups in (1, 8)
    ),
    Family(
        "Falcon-H1",
        {
            **_COMMON,
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
        (_mamba2(f"{_LAYER}.mamba.mamba.in_proj", f"{_LAYER}.mamba.in_proj", 1),),
    ),
    Family(
        "Nemotron-H",
        {
            **_COMMON,
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "num_hidden_layers": 2,
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 8,
            "conv_kernel": 4,
            "chunk_size": 16,
            "expand": 2,
        },
        (_mamba2(f"{_LAYER}.mixer.in_proj", "backbone.layers.0.mixer.in_proj", 8),),
    ),
    Family(
        "Bamba",
        {
            **_COMMON,
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
        (_mamba2(f"{_LAYER}.mamba.in_proj", f"{_LAYER}.mamba.in_proj", 1),),
        until="0.23.0",
    ),
    Family(
        "Jamba",
        {
            **_COMMON,
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
        (Fused(f"{_LAYER}.mamba.in_proj", {f"{_LAYER}.mamba.in_proj": 256}, ALWAYS_EXACT),),
    ),
    Family(
        "LFM2",
        {
            **_COMMON,
            "model_type": "lfm2",
            "architectures": ["Lfm2ForCausalLM"],
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "block_ff_dim": 64,
            "block_dim": HIDDEN,
            "conv_dim": HIDDEN,
            "conv_L_cache": 3,
        },
        (Fused(f"{_LAYER}.short_conv.in_proj", {f"{_LAYER}.conv.in_proj": 192}, UNWRAPPED),),
    ),
)
