"""Reasons of refusals that ``check`` gives, as docs/troubleshooting.md explains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.families.family import COMMON
from support.layout_models import MODELS
from support.layouts import PREFIX, Files, checkpoint
from support.models import import_classes, save_config
from support.release import needs_qwen3_5_text

from vllm_nway_lora.adapters import admission
from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.plan import plan_model
from vllm_nway_lora.diagnosis.report import Outcome
from vllm_nway_lora.models import without_lora

MODEL = next(model for model in MODELS if model.name == "Qwen3.5 text")
LAYER = f"{PREFIX}model.layers.0.linear_attn"


def add_convolution(files: Files) -> None:
    files.tensors[f"{LAYER}.conv1d.lora_A.weight"] = torch.ones(6, 4)
    files.tensors[f"{LAYER}.conv1d.lora_B.weight"] = torch.ones(128, 6)


def add_base_weight(files: Files) -> None:
    files.tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = torch.ones(128, 64)


def add_norm(files: Files) -> None:
    files.tensors[f"{PREFIX}model.norm.weight"] = torch.ones(64)


def add_bias(files: Files) -> None:
    files.tensors[f"{LAYER}.out_proj.lora_B.bias"] = torch.ones(64)


def save_a_module_whole(files: Files) -> None:
    files.config["modules_to_save"] = ["embed_tokens"]


@needs_qwen3_5_text
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_convolution, "the convolution kernel reads its weight directly"),
        (add_base_weight, "is not a LoRA tensor, and vLLM would ignore it"),
        (add_norm, "is unsupported LoRA weight"),
        (add_bias, "is a LoRA bias, which vLLM does not support"),
        (save_a_module_whole, "modules_to_save="),
    ],
)
def test_the_reason_is_the_one_of_the_page(
    tmp_path: Path, change: Callable[[Files], None], reason: str
) -> None:
    save_config(tmp_path, MODEL.config)
    import_classes(MODEL.config)
    files = checkpoint(MODEL)
    change(files)
    report = check_adapter(str(tmp_path), str(files.save(tmp_path / "adapter")))
    assert report.plugin.outcome is Outcome.REFUSED
    assert reason in report.plugin.reason


@needs_qwen3_5_text
def test_a_layout_that_nobody_has_thought_of_is_refused(tmp_path: Path) -> None:
    save_config(tmp_path, MODEL.config)
    import_classes(MODEL.config)
    files = checkpoint(MODEL)
    add_convolution(files)  # it has a layer that does not take it, so it is translated
    folder = files.save(tmp_path / "adapter")
    with mock.patch.object(admission, "translate_adapter", side_effect=KeyError("lora_C")):
        report = check_adapter(str(tmp_path), str(folder))
    assert report.plugin.outcome is Outcome.REFUSED
    assert "its layout cannot be read (KeyError: 'lora_C')" in report.plugin.reason


def test_a_class_without_lora_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin switches LoRA on for listed classes only."""
    monkeypatch.setattr(without_lora, "SWITCHED_ON", {})
    config = {
        **COMMON,
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "partial_rotary_factor": 0.25,
    }
    save_config(tmp_path, config)
    import_classes(config)
    report = plan_model(str(tmp_path))
    assert report.plugin.outcome is report.stock.outcome is Outcome.FAILS
    texts = ("does not support LoRA yet", "LoRA is not supported for")
    assert any(text in report.plugin.reason for text in texts)
