"""Adapters of other layouts that do not fit are refused, and not served as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.layout_models import MODELS
from support.layouts import PREFIX, Files, checkpoint
from support.models import RankModel

import vllm_nway_lora

QWEN = next(model for model in MODELS if model.name == "Qwen3.5 multimodal")
LLAMA = next(model for model in MODELS if model.name == "Llama")
NET = f"{PREFIX}model.language_model.layers.0.linear_attn"
ATTENTION = f"{PREFIX}model.language_model.layers.1.self_attn"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}


@pytest.fixture(scope="module")
def qwen() -> RankModel:
    vllm_nway_lora.register()
    rank = RankModel(QWEN.config, 0, 1)
    rank.wrap()
    return rank


def pair(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


REFUSED = {
    "part, ranks differ": (pair(f"{NET}.in_proj_q", (4, 64), (128, 1)), "ranks of .* differ"),
    "part, another rank": (pair(f"{NET}.in_proj_q", (2, 64), (128, 2)), "says rank 4, found"),
    "part, no rank": (pair(f"{NET}.in_proj_q", (0, 64), (128, 0)), "says rank 4, found"),
    "part, one dimension": (pair(f"{NET}.in_proj_q", (4,), (128, 4)), "two-dimensional"),
    "fused, another rank": (pair(f"{ATTENTION}.qkv_proj", (2, 64), (512, 2)), "says rank 4, found"),
    "fused, one dimension": (pair(f"{ATTENTION}.qkv_proj", (4,), (512, 4)), "two-dimensional"),
    "fused, other rows": (
        pair(f"{ATTENTION}.qkv_proj", (4, 64), (500, 4)),
        "256 . 128 . 128 = 512",
    ),
    "part and whole": (
        pair(f"{NET}.in_proj_q", (4, 64), (128, 4)) | pair(f"{NET}.in_proj_qkv", (4, 64), (512, 4)),
        "have LoRA on the same rows",
    ),
    "Megatron-LM's order": (pair(f"{NET}.in_proj", (4, 64), (800, 4)), "no such layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_does_not_fit_is_refused(qwen: RankModel, tmp_path: Path, case: str) -> None:
    tensors, words = REFUSED[case]
    folder = Files(tensors, CONFIG).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=words):
        qwen.add_adapter("adapter", 1, folder)


def test_a_rank_above_the_limit_names_the_translation(qwen: RankModel, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for letter, rows in (("q", 128), ("k", 128), ("v", 256)):
        tensors |= pair(f"{NET}.in_proj_{letter}", (4, 64), (rows, 4))
    folder = Files(tensors, CONFIG).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"its rank 12 is above --max-lora-rank 8.*folded into"):
        qwen.add_adapter("adapter", 1, folder)


def test_a_changed_base_weight_is_refused_after_a_translation(tmp_path: Path) -> None:
    vllm_nway_lora.register()
    rank = RankModel(LLAMA.config, 0, 1)
    rank.wrap()
    head = f"{PREFIX}lm_head"
    tensors = {
        f"{PREFIX}vera_A": torch.ones(4, 128),
        f"{PREFIX}vera_B": torch.ones(128, 4),
        f"{head}.vera_lambda_d": torch.ones(4),
        f"{head}.vera_lambda_b": torch.ones(128),
        f"{head}.base_layer.weight": torch.ones(128, 64),
    }
    tensors = {name.replace(f"{PREFIX}vera", "base_model.vera"): t for name, t in tensors.items()}
    config = {"peft_type": "VERA", "r": 4, "target_modules": ["lm_head"]}
    folder = Files(tensors, config).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="differs from the model's own weight"):
        rank.add_adapter("adapter", 1, folder)


def test_an_adapter_of_another_layout_is_loaded_again_after_eviction(
    qwen: RankModel, tmp_path: Path
) -> None:
    files = checkpoint(QWEN)
    files.tensors = {
        name.replace("model.language_model.", ""): tensor for name, tensor in files.tensors.items()
    }
    folder = files.save(tmp_path / "adapter")
    for _ in range(2):
        qwen.add_adapter("adapter", 1, folder)
        qwen.remove_adapter(1)
