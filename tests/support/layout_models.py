"""The models on which every layout is tried: modules, parts and fused layers of one tiny class each."""

from __future__ import annotations

from support.families.family import COMMON, GDN, HIDDEN, NEMOTRON_H
from support.families.qwen3_5 import _VISION
from support.layouts import Model

_QKV = {"q_proj": 128, "k_proj": 128, "v_proj": 128}


def _attention(path: str, query: int = 128) -> dict[str, tuple[int, int]]:
    rows = {**_QKV, "q_proj": query}
    return {
        **{f"{path}.{name}": (size, HIDDEN) for name, size in rows.items()},
        f"{path}.o_proj": (HIDDEN, 128),
    }


def _mlp(path: str) -> dict[str, tuple[int, int]]:
    return {
        f"{path}.gate_proj": (64, HIDDEN),
        f"{path}.up_proj": (64, HIDDEN),
        f"{path}.down_proj": (HIDDEN, 64),
    }


def _qwen3_5(name: str, config: dict[str, object], root: str, since: str) -> Model:
    net, attention, mlp = (
        f"{root}layers.0.linear_attn",
        f"{root}layers.1.self_attn",
        f"{root}layers.0.mlp",
    )
    return Model(
        name,
        config,
        {
            f"{net}.in_proj_qkv": (512, HIDDEN),
            f"{net}.in_proj_z": (256, HIDDEN),
            f"{net}.in_proj_b": (16, HIDDEN),
            f"{net}.in_proj_a": (16, HIDDEN),
            f"{net}.out_proj": (HIDDEN, 256),
            **_attention(attention, 256),
            **_mlp(mlp),
        },
        parts={f"{net}.in_proj_qkv": {"in_proj_q": 128, "in_proj_k": 128, "in_proj_v": 256}},
        fused={
            f"{net}.in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
            f"{net}.in_proj_ba": ("in_proj_b", "in_proj_a"),
            f"{attention}.qkv_proj": tuple(_QKV),
            f"{mlp}.gate_up_proj": ("gate_proj", "up_proj"),
        },
        root=root,
        since=since,
    )


_TEXT = {**GDN, "model_type": "qwen3_5_text"}
_LAYER = "model.layers.0"

MODELS = (
    _qwen3_5(
        "Qwen3.5 text", {**_TEXT, "architectures": ["Qwen3_5ForCausalLM"]}, "model.", "0.28.0"
    ),
    _qwen3_5(
        "Qwen3.5 multimodal",
        {
            "model_type": "qwen3_5",
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": _TEXT,
            "vision_config": _VISION,
        },
        "model.language_model.",
        "0.17.0",
    ),
    Model(
        "Nemotron-H",
        NEMOTRON_H,
        {
            "model.layers.0.mixer.in_proj": (128 + 128 + 2 * 16 * 8 + 8, HIDDEN),
            "model.layers.0.mixer.out_proj": (HIDDEN, 128),
            **_attention("model.layers.1.mixer"),
        },
        parts={
            "model.layers.0.mixer.in_proj": {
                "gate_proj": 128,
                "x_proj": 128,
                "": 2 * 16 * 8 + 8,
            }
        },
        fused={"model.layers.1.mixer.qkv_proj": tuple(_QKV)},
        since="0.20.0",  # transformers 4 does not know it
    ),
    Model(
        "Llama",
        {
            **COMMON,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 1,
        },
        {**_attention(f"{_LAYER}.self_attn"), **_mlp(f"{_LAYER}.mlp")},
        fused={
            f"{_LAYER}.self_attn.qkv_proj": tuple(_QKV),
            f"{_LAYER}.mlp.gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
    Model(
        "Phi-3",
        {
            **COMMON,
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "num_hidden_layers": 1,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            f"{_LAYER}.self_attn.qkv_proj": (384, HIDDEN),
            f"{_LAYER}.self_attn.o_proj": (HIDDEN, 128),
            f"{_LAYER}.mlp.gate_up_proj": (128, HIDDEN),
            f"{_LAYER}.mlp.down_proj": (HIDDEN, 64),
        },
        parts={
            f"{_LAYER}.self_attn.qkv_proj": _QKV,
            f"{_LAYER}.mlp.gate_up_proj": {"gate_proj": 64, "up_proj": 64},
        },
    ),
)
