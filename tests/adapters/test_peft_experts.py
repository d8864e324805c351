"""Adapters that PEFT saves of transformers' mixtures have PEFT's own deltas after translation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Mixture
from vllm_nway_lora.adapters.target import Pair

HIDDEN, INTERMEDIATE, EXPERTS, RANK, ALPHA = 32, 12, 4, 2, 8
IS_FIVE = Version(transformers.__version__) >= Version("5")

_USUAL = {
    **{"vocab_size": 16, "hidden_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16},
}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}

#: transformers' model -> changes of its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": _QWEN | {"intermediate_size": 8, "decoder_sparse_step": 1},
    "MixtralForCausalLM": _LOCAL | {"intermediate_size": INTERMEDIATE},
    "GptOssForCausalLM": _LOCAL
    | {"intermediate_size": INTERMEDIATE, "layer_types": ["full_attention"]},
    "Llama4ForCausalLM": _LOCAL
    | {"intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 8}
    | {"interleave_moe_layer_step": 1},
    "Qwen3_5MoeForCausalLM": _QWEN
    | {"layer_types": ["full_attention"], "shared_expert_intermediate_size": 8},
    "GraniteMoeForCausalLM": _LOCAL | {"intermediate_size": INTERMEDIATE},
}
if not IS_FIVE:  # the others have a module per expert, or are not there
    MODELS = {name: MODELS[name] for name in ("GptOssForCausalLM", "Llama4ForCausalLM")}

PARAMETERS = {
    "both": ["gate_up_proj", "down_proj"],
    "gate_up": ["gate_up_proj"],
    "down": ["down_proj"],
}


def build_model(name: str) -> Any:
    model_class = getattr(transformers, name)
    config = model_class.config_class
    if name in ("Llama4ForCausalLM", "Qwen3_5MoeForCausalLM"):
        text = {
            "Llama4ForCausalLM": "Llama4TextConfig",
            "Qwen3_5MoeForCausalLM": "Qwen3_5MoeTextConfig",
        }
        config = getattr(transformers, text[name])
    return model_class(config(**(_USUAL | MODELS[name])))


def fill(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randint(-3, 4, parameter.shape, generator=generator)
            parameter.data = values.to(parameter.dtype)


def read_pairs(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Pair]]:
    """Return the path of the mixture, and its modules with the scaling that vLLM reads."""
    tensors = load_file(folder / "adapter_model.safetensors")
    path = ""
    pairs = {}
    for name, tensor in tensors.items():
        head, found, tail = name.removeprefix("base_model.model.").partition(".experts")
        module, is_a, _ = tail.rpartition("lora_A.weight")
        if found and is_a:
            path = head + found
            module = module.strip(".")
            b = tensors[name.replace("lora_A", "lora_B")]
            pairs[module] = Pair(tensor, b, config["lora_alpha"] / config["r"])
    return path, pairs


def expected_deltas(model: PeftModel, is_interleaved: bool) -> dict[str, torch.Tensor]:
    """Return PEFT's ``get_delta_weight`` as ``(experts, rows, columns)``."""
    n = INTERMEDIATE
    found = {kind: torch.zeros(EXPERTS, n, HIDDEN) for kind in ("gate", "up")}
    found["down"] = torch.zeros(EXPERTS, HIDDEN, n)
    for module in model.modules():
        if type(module).__name__ != "ParamWrapper" or module.num_experts != EXPERTS:
            continue
        delta = module.get_delta_weight("default").detach()
        if module.parameter_name == "down_proj":
            found["down"] = delta if delta.shape[1] == HIDDEN else delta.mT
        else:
            rows = delta if delta.shape[2] == HIDDEN else delta.mT
            gate, up = (rows[:, ::2], rows[:, 1::2]) if is_interleaved else rows.chunk(2, 1)
            found |= {"gate": gate, "up": up}
    return found


def apply(
    pairs: dict[str, Pair], is_stacked: bool, is_interleaved: bool
) -> dict[str, torch.Tensor]:
    """Return what vLLM applies of the translated pairs."""
    if not is_stacked:
        return {
            kind: torch.stack(
                [
                    pair.scaling * pair.b @ pair.a
                    for pair in (pairs[f"{e}.{kind}_proj"] for e in range(EXPERTS))
                ]
            )
            for kind in ("gate", "up", "down")
        }
    found = {}
    for name, pair in pairs.items():
        a = pair.a.reshape(EXPERTS, -1, pair.a.shape[-1])
        b = pair.b.reshape(pair.b.shape[0], -1, EXPERTS).permute(2, 0, 1)
        found[name] = pair.scaling * b @ a
    rows = found["base_layer"]
    gate, up = (rows[:, ::2], rows[:, 1::2]) if is_interleaved else rows.chunk(2, 1)
    return {"gate": gate, "up": up, "down": found[""]}


def assert_exact(model: PeftModel, folder: Path, name: str, **changes: Any) -> None:
    """Save an adapter, translate it for both kinds of layers, and compare it with PEFT's deltas."""
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    path, pairs = read_pairs(folder, config)
    is_interleaved = name == "GptOssForCausalLM"
    expected = expected_deltas(model, is_interleaved)
    assert any(delta.any() for delta in expected.values())
    for is_stacked in (False, True):
        mixture = Mixture(
            path=path,
            experts=EXPERTS,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
            is_stacked=is_stacked,
            is_interleaved=is_interleaved,
            modules=[{k: f"{e}.{k}_proj" for k in ("gate", "down", "up")} for e in range(EXPERTS)],
            local=range(EXPERTS),
        )
        written, _ = translate_experts(copy.deepcopy(pairs), mixture, config)
        for kind, delta in apply(written, is_stacked, is_interleaved).items():
            assert torch.equal(delta, expected[kind]), (is_stacked, kind)


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("name", MODELS)
def test_target_parameters(name: str, parameters: str, is_old: bool, tmp_path: Path) -> None:
    """PEFT to 0.18 does what later ones do with a true ``is_transposed``: it swaps nothing."""
    base = build_model(name)
    if is_old:
        for module in base.modules():
            if getattr(module, "gate_up_proj", None) is not None:
                module.is_transposed = True
    targets = [f"experts.{parameter}" for parameter in PARAMETERS[parameters]]
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], target_parameters=targets
    )
    model = get_peft_model(base, config)
    fill(model)
    assert_exact(model, tmp_path, name, peft_version="0.18.1" if is_old else "0.19.0")


@pytest.mark.skipif(not IS_FIVE, reason="a module per expert in transformers 4")
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
def test_usual_target_modules(targets: Any, tmp_path: Path) -> None:
    """PEFT turns them into ``target_parameters`` with twice the rank for gate_up_proj."""
    base = build_model("Qwen3MoeForCausalLM")
    model = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"),
    )
    fill(model)
    config = model.peft_config["default"]
    key = get_pattern_key(config.rank_pattern, "model.layers.0.mlp.experts.gate_up_proj")
    assert config.rank_pattern[key] == 2 * RANK
    assert_exact(model, tmp_path, "Qwen3MoeForCausalLM")


@pytest.mark.skipif(not IS_FIVE, reason="a module per expert in transformers 4")
def test_patterns_and_rslora(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"experts.gate_up_proj": 4}}
    for number, parameters in enumerate(PARAMETERS.values()):
        config = LoraConfig(
            r=4,
            lora_alpha=ALPHA,
            use_rslora=True,
            target_modules=["q_proj"],
            target_parameters=[f"experts.{parameter}" for parameter in parameters],
            **patterns,
        )
        model = get_peft_model(build_model("MixtralForCausalLM"), config)
        fill(model)
        assert_exact(model, tmp_path / str(number), "MixtralForCausalLM")


@pytest.mark.skipif(IS_FIVE, reason="the class has is_transposed from transformers 5 on")
def test_new_peft_swaps_gpt_oss_on_transformers_4(tmp_path: Path) -> None:
    config = LoraConfig(
        r=RANK, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
    )
    model = get_peft_model(build_model("GptOssForCausalLM"), config)
    model.save_pretrained(tmp_path)
    _, pairs = read_pairs(tmp_path, {"lora_alpha": 1, "r": 1})
    assert pairs[""].a.shape == (EXPERTS * RANK, 2 * INTERMEDIATE)
