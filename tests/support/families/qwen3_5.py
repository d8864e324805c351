"""Families with Qwen3.5's gated delta net, also in multimodal and pooling model classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.families.family import (
    ALWAYS_EXACT,
    GDN,
    GDN_LAYER,
    HIDDEN,
    REFUSED,
    UNWRAPPED,
    Family,
    Fused,
    StubExperts,
)

_VISION: Mapping[str, Any] = {
    "model_type": "qwen3_5",
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 8,
    "intermediate_size": 64,
    "out_hidden_size": HIDDEN,
    "patch_size": 2,
    "num_position_embeddings": 16,
}
_MINICPM_VISION: Mapping[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 64,
}
_MODELS = "vllm.model_executor.models"
_MOBIUS = f"{_MODELS}.interns2_mobius"


def delta_net(layer: str, module: str) -> tuple[Fused, Fused]:
    """Return both fused projections of layer 0's gated delta net.

    Args:
        layer: path of the gated delta net in vLLM's model.
        module: its path in a checkpoint.
    """
    return (
        Fused(
            f"{layer}.in_proj_qkvz",
            {f"{module}.in_proj_qkv": 512, f"{module}.in_proj_z": 256},
            (REFUSED,) * 4,
            outputs=4,
        ),
        Fused(
            f"{layer}.in_proj_ba",
            {f"{module}.in_proj_b": 16, f"{module}.in_proj_a": 16},
            ALWAYS_EXACT,
        ),
    )


_LAYER = "language_model.model.layers.0.linear_attn"
_MODULE = "model.language_model.layers.0.linear_attn"
_DENSE: Mapping[str, Any] = {
    "model_type": "qwen3_5",
    "text_config": {**GDN, "model_type": "qwen3_5_text"},
    "vision_config": _VISION,
}
_OLD = {**_DENSE, "architectures": ["Qwen3_5ForConditionalGeneration"]}
_EXPERTS: Mapping[str, Any] = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        **GDN,
        "model_type": "qwen3_5_moe_text",
        "num_experts": 8,
        "num_blocks": 1,  # Intern-S2-Mobius' banks of experts
    },
    "vision_config": _VISION,
}

QWEN3_5_FAMILIES = (
    Family(
        "Qwen3.5, Qwen3.6 and all with its gated delta net",
        {**GDN, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
        delta_net(GDN_LAYER, GDN_LAYER),
        since="0.28.0",
    ),
    Family(
        "Qwen3.5, multimodal, fused for LoRA",
        _OLD,
        delta_net(_LAYER, _MODULE),
        until="0.18.1",
    ),
    Family(
        "Qwen3.5, multimodal, unfused for LoRA",
        _OLD,
        (
            Fused(f"{_LAYER}.in_proj_qkv", {f"{_MODULE}.in_proj_qkv": 512}, UNWRAPPED, outputs=3),
            Fused(f"{_LAYER}.in_proj_z", {f"{_MODULE}.in_proj_z": 256}, ALWAYS_EXACT),
        ),
        since="0.19.0",
        until="0.20.2",
    ),
    *(
        Family(
            name,
            {"architectures": [architecture], **config},
            delta_net(_LAYER, module),
            stubs=(
                f"{_MODELS}.qwen3_5.Qwen3_5_MoeMixtureOfExperts.set_moe_parameters",
                f"{_MODELS}.qwen3_next.QwenNextMixtureOfExperts.set_moe_parameters",
                f"{_MODELS}.colqwen3_5.ColQwen3_5ProcessingInfo.get_hf_processor",  # needs files
            ),
            replaced={f"{_MODELS}.qwen3_5.Qwen3NextSparseMoeBlock": StubExperts},
            since=since,
        )
        for name, architecture, since, module, config in (
            (
                "Qwen3.5, multimodal",
                "Qwen3_5ForConditionalGeneration",
                "0.21.0",
                _MODULE,
                _DENSE,
            ),
            (
                "Intern-S2 Preview",
                "InternS2PreviewForConditionalGeneration",
                "0.32.0",
                _MODULE,
                _EXPERTS,
            ),
            (
                "Clef-Flash",
                "ClefFlashForJointSchema",
                "0.33.0",
                _MODULE,
                {
                    **_DENSE,
                    "joint_head_config": {
                        "hidden_size": HIDDEN,
                        "width": 8,
                        "routing_layers": 1,
                        "layers": 1,
                        "heads": 1,
                        "feedforward": 8,
                    },
                },
            ),
            (
                "ColQwen3.5",
                "ColQwen3_5",
                "0.33.0",
                "language_model.layers.0.linear_attn",
                {**_DENSE, "retrieval_attention_contract": "causal"},
            ),
            *(
                (
                    name,
                    f"MiniCPM{which}ForConditionalGeneration",
                    "0.33.0",
                    _MODULE,
                    {
                        "model_type": model_type,
                        "text_config": {**GDN, "model_type": "qwen3_5_text"},
                        "vision_config": {**_MINICPM_VISION, "model_type": f"{model_type}_vision"},
                    },
                )
                for name, which, model_type in (
                    ("MiniCPM-V 4.6", "V4_6", "minicpmv4_6"),
                    ("MiniCPM-V 4.7", "V4_7", "minicpmv4_7"),
                    # Its configuration is newer than transformers; 4.6's has the same fields.
                    ("MiniCPM-OCR", "Ocr", "minicpmv4_6"),
                )
            ),
        )
    ),
    Family(
        "Intern-S2-Mobius",
        {"architectures": ["InternS2MobiusForConditionalGeneration"], **_EXPERTS},
        delta_net(_LAYER, _MODULE),
        stubs=(
            f"{_MOBIUS}.InternS2MobiusForConditionalGeneration.set_moe_parameters",
            f"{_MOBIUS}.cached_tokenizer_from_config",
        ),
        replaced={f"{_MOBIUS}.InternS2MobiusMetaMoeBlock": StubExperts},
        since="0.33.0",
    ),
)
