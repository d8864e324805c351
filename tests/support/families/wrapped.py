"""Families with a text model inside a multimodal class that has its own mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from support.families.attention import ATTENTION_FAMILIES
from support.families.delta import DELTA_FAMILIES
from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    HIDDEN,
    IGNORED,
    LAYER,
    NEMOTRON_H,
    REFUSED,
    UNWRAPPED,
    VLLM,
    Family,
    Fused,
)
from support.families.mla import MLA, MLA_STUBS, down_projection


class PublishedConfig(PretrainedConfig):
    """A configuration with a checkpoint's fields, under the names that vLLM reads.

    These models publish their own configuration class next to their weights; transformers' classes,
    where they exist, rename fields. vLLM also reads Mistral's own format into plain configurations.
    """

    model_type = "published"

    def __init__(self, **fields: Any) -> None:
        parts = {name: fields.pop(name) for name in list(fields) if name.endswith("_config")}
        super().__init__(**fields)
        for name, part in parts.items():
            known = AutoConfig.for_model if part.get("model_type") else PretrainedConfig
            setattr(self, name, known(**part))


class StubTower(nn.Module):
    """A stub for a vision tower that does not support LoRA and exists only in its published sizes."""

    def load_weights(self, weights: Any) -> None:
        assert not list(weights)


AutoConfig.register("published", PublishedConfig)


def _wrap_family(
    text: Family,
    name: str,
    config: Mapping[str, Any],
    rename: tuple[str, str] = ("", ""),
    layer: str = "language_model.",
    stubs: Sequence[str | tuple[str, Any]] = (),
    **changes: Any,
) -> Family:
    """Return a family with the fused projections of another family's text model.

    Args:
        text: the text model's family.
        name: the new family's name.
        config: the new family's configuration.
        rename: (part of the text model's module paths, its replacement in the new checkpoints).
        layer: prefix of the text model's layers in vLLM's new model.
        stubs: further stubs.
        changes: other fields of the new :class:`Family`.
    """
    fused = tuple(
        dataclasses.replace(
            f,
            layer=f"{layer}{f.layer}",
            modules={m.replace(*rename, 1): rows for m, rows in f.modules.items()},
        )
        for f in text.fused
    )
    return dataclasses.replace(
        text, name=name, config=config, fused=fused, stubs=(*text.stubs, *stubs), **changes
    )


_TEXT = {family.name: family for family in (*ATTENTION_FAMILIES, *DELTA_FAMILIES)}
_QWEN4 = _TEXT["Qwen4-Exp, hyper-connections padded"]
_STEP5 = _TEXT["Step5, 8 KV heads"]
_INKLING = _TEXT["Inkling"]
_DEEPSEEK4 = _TEXT["DeepSeek-V4"]

_MUSE = "vllm.models.muse_spark"
_NANO_VL = f"{VLLM}.models.nano_nemotron_vl"
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}

WRAPPED_FAMILIES = (
    Family(
        "Pixtral around Mistral Large 3",
        {
            "model_type": "published",
            "architectures": ["PixtralForConditionalGeneration"],
            "text_config": {
                **MLA,
                "model_type": "deepseek_v3",
                "architectures": ["MistralLarge3ForCausalLM"],
            },
            "vision_config": {
                "hidden_size": 64,
                "num_channels": 3,
                "image_size": 8,
                "patch_size": 2,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 8,
                "rope_theta": 1e4,
                "image_token_id": 10,
            },
        },
        # The wrapper's mapping replaces the text model's, which has the two modules.
        (down_projection(f"language_model.{LAYER}.self_attn", (REFUSED,) * 4),),
        stubs=MLA_STUBS,
        since="0.32.0",  # before, its tower imported a part of transformers that has moved
    ),
    Family(
        "Molmo2",
        {
            "model_type": "published",
            "architectures": ["Molmo2ForConditionalGeneration"],
            "image_patch_id": 10,
            "text_config": {
                **COMMON,
                "num_hidden_layers": 1,
                "additional_vocab_size": 8,
                "hidden_act": "silu",
                "layer_norm_eps": 1e-6,
                "norm_after": False,
                "qkv_bias": False,
                "use_qk_norm": True,
                "qk_norm_type": "qwen3",
                "rope_scaling_layers": None,
                "rope_theta": 1e4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vit_config": {
                **_HEADS,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "image_default_input_size": [8, 8],
                "image_patch_size": 2,
                "image_num_pos": 16,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
            },
            "adapter_config": {
                **_HEADS,
                "vit_layers": [0],
                "hidden_act": "silu",
                "pooling_attention_mask": False,
                "hidden_size": 64,
                "intermediate_size": 64,
                "text_hidden_size": HIDDEN,
            },
        },
        (
            Fused(
                f"{LAYER}.mlp.up_gate_proj",
                {"model.transformer.blocks.0.mlp.ff_proj": 128},
                ALWAYS_EXACT,
                outputs=2,
            ),
        ),
        since="0.20.0",
        required={
            "model.transformer.wte.embedding": (128, HIDDEN),
            "model.transformer.wte.new_embedding": (8, HIDDEN),
        },
    ),
    Family(
        "Nemotron-H Nano VL",
        {
            "model_type": "published",
            "architectures": ["NemotronH_Nano_VL_V2"],
            "text_config": {
                **NEMOTRON_H,
                "dtype": "float32",
            },
            "vision_config": {"args": {}},
            "downsample_ratio": 0.5,
            "force_image_size": 8,
            "patch_size": 2,
            "template": "",
            "ps_version": "v2",
            "image_tag_type": "",
            "vit_hidden_size": 64,
            "projector_hidden_size": 64,
        },
        (
            Fused(
                f"language_model.{LAYER}.mixer.in_proj",
                {"language_model.backbone.layers.0.mixer.in_proj": 128 + 128 + 2 * 16 * 8 + 8},
                UNWRAPPED,
                outputs=5,
            ),
        ),
        stubs=((f"{_NANO_VL}.cached_tokenizer_from_config", mock.MagicMock()),),
        replaced={
            f"{_NANO_VL}.NemotronH_Nano_VL_V2.get_vit_model_from_radio_config": (
                lambda *_: StubTower()
            ),
        },
        since="0.31.0",  # before, vLLM did not support LoRA on it
    ),
    _wrap_family(
        _QWEN4,
        "Qwen4-Exp, multimodal",
        {
            "model_type": "qwen4_exp",
            "architectures": ["Qwen4ExpForConditionalGeneration"],
            "text_config": _QWEN4.config,
            "vision_config": {
                "model_type": "qwen4_exp",
                "depth": 1,
                "hidden_size": 64,
                "num_heads": 8,
                "intermediate_size": 64,
                "out_hidden_size": HIDDEN,
                "deepstack_visual_indexes": [],
            },
        },
        ("model.", "model.language_model."),
        stubs=(
            "vllm.models.qwen4_exp.nvidia.model.Qwen4ExpForConditionalGeneration.set_moe_parameters",
            "vllm.models.qwen4_exp.nvidia.model.cached_tokenizer_from_config",
        ),
    ),
    _wrap_family(
        _STEP5,
        "Step5, multimodal",
        {
            "model_type": "step5_vl",
            "architectures": ["Step5ForConditionalGeneration"],
            "text_config": _STEP5.config,
            "vision_config": {
                "width": 64,
                "layers": 1,
                "heads": 8,
                "mlp_ratio": 1.0,
                "hidden_act": "gelu",
            },
        },
        ("model.", "model.language_model."),
    ),
    _wrap_family(
        _INKLING,
        "Inkling, multimodal",
        {
            "model_type": "inkling_mm_model",
            "architectures": ["InklingForConditionalGeneration"],
            "text_config": _INKLING.config,
        },
        layer="",
    ),
    _wrap_family(
        _DEEPSEEK4,
        "DeepSeek-V4, multimodal",
        {
            **_DEEPSEEK4.config,
            "architectures": ["DeepseekV4ForConditionalGeneration"],
            "vision_n_layers": 0,
        },
        classes={
            **_DEEPSEEK4.classes,
            "DeepseekV4ForConditionalGeneration": (
                "vllm.models.deepseek_v4.common.vl_model:DeepseekV4ForConditionalGeneration"
            ),
        },
    ),
    Family(
        "Muse Spark",
        {
            "model_type": "muse_spark",
            "architectures": ["MuseSparkForConditionalGeneration"],
            "projector_hidden_size": 64,
            "out_hidden_size": 64,
            "text_config": {
                **COMMON,
                "model_type": "muse_spark_text",
                "num_hidden_layers": 1,
                "hidden_act": "silu",
                "attention_bias": False,
                "num_shared_experts": 0,
                "layer_types": ["full_attention"],
                "mlp_layer_types": ["dense"],
                "layer_rope_theta": [1e4],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_window": 16,
                "qk_scale_factor": 1.0,
                "post_norm_eps": 1e-6,
                "residual_gate_temperature": 0.3,
                "output_multiplier": 1.0,
                "final_logit_softcapping": None,
            },
            "vision_config": {
                "model_type": "muse_spark_vision",
                "hidden_act": "gelu",
                "rope_parameters": {"rope_type": "axial"},
                "num_hidden_layers": 1,
                "layer_types": ["full_attention"],
                "hidden_size": 64,
                "merge_size": 1,
                "patch_size": 2,
                "patch_temporal": 1,
            },
            "audio_config": {
                "model_type": "muse_spark_audio",
                "hidden_act": "gelu",
                "patch_sizes": [2],
                "depths": [1],
                "hidden_sizes": [64],
                "num_hidden_layers": 1,
                "out_hidden_size": 64,
                "conv_kernel_size": 3,
                "mlp_ratio": 1,
                "rms_norm_eps": 1e-6,
            },
        },
        (
            Fused(
                f"{LAYER}.self_attn.qkv_proj",
                {
                    f"model.language_model.layers.0.self_attn.{part}_proj": 128
                    for part in ("q", "k", "v", "gate")
                },
                # Stock vLLM refuses all adapters except those on gate_proj alone, which it ignores: its
                # MLPs have a module of that name too.
                (IGNORED,) * 4,
            ),
        ),
        replaced={
            f"{_MUSE}.common.omni.{tower}": lambda *_, **__: StubTower()
            for tower in ("NaViT", "AutoEncoder")
        },
        classes={
            "MuseSparkForConditionalGeneration": (
                f"{_MUSE}.nvidia.multimodal:MuseSparkForConditionalGeneration"
            ),
        },
        since="0.33.0",
    ),
)
