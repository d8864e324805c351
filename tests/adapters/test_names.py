"""Tests of other names of a model's modules."""

from __future__ import annotations

import pytest

from vllm_nway_lora.adapters.names import Names, explain, find_nearest
from vllm_nway_lora.adapters.target import LayoutError, Part, Target

LAYERS = "language_model.model.layers"
TARGET = Target(
    modules={
        f"{LAYERS}.0.self_attn.q_proj": 8,
        f"{LAYERS}.1.self_attn.q_proj": 8,
        f"{LAYERS}.0.linear_attn.in_proj_qkv": 12,
        "visual.blocks.0.attn.qkv": 6,
        "language_model.lm_head": 32,
        "language_model.model.embed_tokens": 4,
    },
    fused={
        f"{LAYERS}.0.mlp.gate_up_proj": (f"{LAYERS}.0.mlp.gate_proj", f"{LAYERS}.0.mlp.up_proj")
    },
    parts={f"{LAYERS}.0.linear_attn.in_proj_q": Part(f"{LAYERS}.0.linear_attn.in_proj_qkv", 0, 4)},
    mixtures=frozenset({f"{LAYERS}.1.mlp.experts"}),
    absent=(f"{LAYERS}.7",),
    aliases={
        "model.layers.0.self_attn.query": f"{LAYERS}.0.self_attn.q_proj",
        "model.layers.1.moe.bank": f"{LAYERS}.1.mlp.experts",
    },
)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"{LAYERS}.0.self_attn.q_proj", f"{LAYERS}.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj", f"{LAYERS}.0.self_attn.q_proj"),
        ("layers.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.q_proj"),
        ("transformer.layers.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.q_proj"),
        ("model.model.layers.0.mlp.gate_up_proj", f"{LAYERS}.0.mlp.gate_up_proj"),
        ("model.layers.0.linear_attn.in_proj_q", f"{LAYERS}.0.linear_attn.in_proj_q"),
        ("model.layers.0.self_attn.query", f"{LAYERS}.0.self_attn.q_proj"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("lm_head", "language_model.lm_head"),
        ("embed_tokens", "language_model.model.embed_tokens"),
        ("model.layers.1.mlp.experts", f"{LAYERS}.1.mlp.experts"),
        ("model.layers.1.mlp.experts.base_layer", f"{LAYERS}.1.mlp.experts.base_layer"),
        ("model.layers.1.mlp.experts.3.up_proj", f"{LAYERS}.1.mlp.experts.3.up_proj"),
        ("model.layers.1.moe.bank.3.up_proj", f"{LAYERS}.1.mlp.experts.3.up_proj"),
        ("layers.1.mlp.switch_mlp.up_proj", f"{LAYERS}.1.mlp.experts.up_proj"),
        ("model.layers.7.mlp.up_proj", f"{LAYERS}.7.mlp.up_proj"),
        ("lora_unet_model_layers_0_self_attn_q_proj", f"{LAYERS}.0.self_attn.q_proj"),
    ],
)
def test_a_name_that_one_module_can_have(name: str, path: str) -> None:
    assert Names(TARGET).resolve(name) == path


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.self_attn.q_proj",  # a draft model's layers have the same names
        "model.decoder.layers.0.self_attn.q_proj",
        "visual.layers.0.self_attn.q_proj",
        "layers.2.self_attn.q_proj",
        "0.self_attn.q_proj",
        "self_attn.q_proj",
        "q_proj",
        "qkv",
        "lora_unet_mtp_layers_0_self_attn_q_proj",
    ],
)
def test_a_name_that_no_module_can_have(name: str) -> None:
    assert Names(TARGET).resolve(name) is None


def test_a_layer_without_lora_is_found_too() -> None:
    """Admission then says that `--lora-target-modules` leaves it out."""
    target = Target(modules={}, unwrapped=frozenset({f"{LAYERS}.0.mlp.up_proj"}))
    assert Names(target).resolve("layers.0.mlp.up_proj") == f"{LAYERS}.0.mlp.up_proj"


def test_the_first_name_that_is_known_counts() -> None:
    names = Names(TARGET)
    assert names.resolve("unknown.layers.0.x", "layers.0.self_attn.q_proj") is not None
    assert (
        names.resolve(f"{LAYERS}.1.self_attn.q_proj", "lm_head") == f"{LAYERS}.1.self_attn.q_proj"
    )


def test_a_name_of_two_modules_is_refused_with_both() -> None:
    target = Target(
        modules={"model.layers.0.q_proj": 8, "language_model.layers.0.q_proj": 8, "o_proj": 8}
    )
    message = (
        "module layers.0.q_proj can be language_model.layers.0.q_proj, model.layers.0.q_proj: rename it "
        "in the adapter"
    )
    with pytest.raises(LayoutError) as raised:
        Names(target).resolve("layers.0.q_proj")
    assert str(raised.value) == message
    assert Names(target).resolve("model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_a_name_of_two_layers_of_experts_is_refused() -> None:
    target = Target(
        modules={}, mixtures=frozenset({"model.layers.0.experts", "llm.layers.0.experts"})
    )
    with pytest.raises(LayoutError, match="rename it in the adapter"):
        Names(target).resolve("layers.0.experts.3.up_proj")


def test_the_nearest_module_is_of_the_same_layer() -> None:
    nearest = find_nearest("model.layers.1.attention.q_proj", TARGET)
    assert nearest == f"{LAYERS}.1.self_attn.q_proj"
    assert find_nearest("model.layers.99.attention.q_proj", TARGET) == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decoder.layers.0.self_attention.linear_qkv", "Megatron-Bridge"),
        ("decoder.layers.0.mlp.linear_fc1.adapter.linear_in", "Megatron-LM"),
        ("model.layers.0.attention.q_proj", f"{LAYERS}.0.self_attn.q_proj"),
        ("model.layers.99.attention.q_proj", ""),
    ],
)
def test_an_unknown_name_is_explained(name: str, words: str) -> None:
    explanation = explain(name, TARGET)
    assert words in explanation
    assert bool(words) == bool(explanation)
