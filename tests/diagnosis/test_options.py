"""Tests of ``check`` with the options of ``vllm serve``: each changes the answer as on a server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_check import CONFIG as MOE_CONFIG
from support.expert_check import apart, save, stacked
from support.layout_models import MODELS
from support.layouts import Files, checkpoint
from support.models import import_classes, save_config
from support.worker import compare
from vllm.config.lora import LoRAConfig

from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions, UsageError
from vllm_nway_lora.diagnosis.report import Outcome

MULTIMODAL = next(model for model in MODELS if model.name == "Qwen3.5 multimodal")
LLAMA = next(model for model in MODELS if model.name == "Llama")
TOWER = "visual.blocks.*.attn.qkv"
FIELDS = {field.name for field in dataclasses.fields(LoRAConfig)}


def add_tower(files: Files) -> Files:
    for half, shape in (("lora_A", (6, 64)), ("lora_B", (192, 6))):
        name = f"base_model.model.model.visual.blocks.0.attn.qkv.{half}.weight"
        files.tensors[name] = torch.ones(shape)
    return files


@pytest.mark.parametrize("enabled", [False, True])
def test_a_tower_is_left_out_unless_the_server_has_lora_on_it(
    tmp_path: Path, enabled: bool
) -> None:
    save_config(tmp_path, MULTIMODAL.config)
    import_classes(MULTIMODAL.config)
    folder = add_tower(checkpoint(MULTIMODAL)).save(tmp_path / "adapter")
    options = ServerOptions(enable_tower_connector_lora=enabled)
    report = check_adapter(str(tmp_path), str(folder), options)
    assert report.plugin.outcome is Outcome.EXACT, report.plugin
    assert list(report.left_out.values()) == ([] if enabled else [[TOWER]])
    assert enabled == any(row.layer == TOWER for row in report.rows)
    assert not compare(tmp_path, [folder], options)


@pytest.mark.skipif("target_modules" not in FIELDS, reason="from 0.19.0 on")
def test_modules_that_the_server_does_not_adapt_are_left_out(tmp_path: Path) -> None:
    save_config(tmp_path, LLAMA.config)
    import_classes(LLAMA.config)
    folder = checkpoint(LLAMA).save(tmp_path / "adapter")
    options = ServerOptions(lora_target_modules=("qkv_proj",))
    report = check_adapter(str(tmp_path), str(folder), options)
    [(reason, modules)] = report.left_out.items()
    assert "--lora-target-modules" in reason
    assert "model.layers.*.mlp.gate_up_proj" not in [row.layer for row in report.rows]
    assert any(module.endswith("gate_proj") for module in modules)
    assert report.plugin.outcome is Outcome.EXACT
    assert not compare(tmp_path, [folder], options)


@pytest.mark.skipif("enable_mixed_moe_lora_format" not in FIELDS, reason="from 0.24.0 on")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tensors", [apart(), stacked()], ids=["apart", "stacked"])
def test_both_formats_of_experts(
    tmp_path: Path, tensors: dict[str, torch.Tensor], mixed: bool
) -> None:
    save_config(tmp_path, MOE_CONFIG)
    import_classes(MOE_CONFIG)
    folder = save(tensors, tmp_path / "adapter")
    options = ServerOptions(enable_mixed_moe_lora_format=mixed)
    report = check_adapter(str(tmp_path), str(folder), options)
    assert report.plugin.outcome is Outcome.EXACT, report.plugin
    assert not compare(tmp_path, [folder], options)


def test_overrides_replace_settings_of_the_configuration(tmp_path: Path) -> None:
    save_config(tmp_path, LLAMA.config)
    import_classes(LLAMA.config)
    folder = checkpoint(LLAMA).save(tmp_path / "adapter")
    wider = {"intermediate_size": 2 * LLAMA.config["intermediate_size"]}
    report = check_adapter(str(tmp_path), str(folder), ServerOptions(hf_overrides=wider))
    assert report.plugin.outcome is Outcome.REFUSED
    assert "gate_proj" in report.plugin.reason


def test_overrides_reach_the_text_configuration(tmp_path: Path) -> None:
    save_config(tmp_path, MULTIMODAL.config)
    import_classes(MULTIMODAL.config)
    folder = checkpoint(MULTIMODAL).save(tmp_path / "adapter")
    text = {"text_config": {"linear_num_value_heads": 8}}
    report = check_adapter(str(tmp_path), str(folder), ServerOptions(hf_overrides=text))
    assert report.plugin.outcome is Outcome.REFUSED
    assert "in_proj" in report.plugin.reason


REMOTE = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_remote_code_runs_only_where_it_is_trusted(tmp_path: Path, trusted: bool) -> None:
    own: dict[str, Any] = {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
    }
    save_config(tmp_path, {**LLAMA.config, **own})
    (tmp_path / "configuration_own.py").write_text(REMOTE)
    import_classes(LLAMA.config)
    folder = checkpoint(LLAMA).save(tmp_path / "adapter")
    options = ServerOptions(trust_remote_code=trusted)
    if not trusted:
        with pytest.raises(UsageError, match="trust"):
            check_adapter(str(tmp_path), str(folder), options)
        return
    report = check_adapter(str(tmp_path), str(folder), options)
    assert report.plugin.outcome is Outcome.EXACT, json.dumps(str(report.plugin))
