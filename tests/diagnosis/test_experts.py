"""Tests of ``check`` on adapters of experts: vLLM's own LoRA layers judge them, without a kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families.family import COMMON
from support.layout_models import MODELS
from support.layouts import checkpoint
from support.models import import_classes, save_config

from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.report import Outcome

EXPERTS, HIDDEN, INTERMEDIATE, RANK = 4, 64, 32, 4
PATH = "base_model.model.model.layers.0.mlp.experts"
CONFIG = {
    **COMMON,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INTERMEDIATE,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def stacked(intermediate: int = INTERMEDIATE) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT 0.19 and later write for the seven usual modules."""
    flat = EXPERTS * RANK
    return {
        f"{PATH}.base_layer.lora_A.weight": torch.zeros(flat, HIDDEN),
        f"{PATH}.base_layer.lora_B.weight": torch.zeros(2 * intermediate, flat),
        f"{PATH}.lora_A.weight": torch.zeros(flat, intermediate),
        f"{PATH}.lora_B.weight": torch.zeros(HIDDEN, flat),
    }


def apart(
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, torch.Tensor]:
    """Return the tensors of a module per expert."""
    tensors = {}
    for expert in range(EXPERTS):
        for name in names:
            columns, rows = (
                (INTERMEDIATE, HIDDEN) if name == "down_proj" else (HIDDEN, INTERMEDIATE)
            )
            module = f"{PATH}.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.zeros(RANK, columns)
            tensors[f"{module}.lora_B.weight"] = torch.zeros(rows, RANK)
    return tensors


@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize(
    ("tensors", "stock", "plugin", "rule"),
    [
        (apart(), Outcome.EXACT, Outcome.EXACT, ""),
        (stacked(), Outcome.REFUSED, Outcome.EXACT, "split into the modules of 4 experts"),
        (apart(("down_proj",)), Outcome.REFUSED, Outcome.EXACT, "zeros for gate_proj, up_proj"),
        (stacked(INTERMEDIATE // 2), Outcome.REFUSED, Outcome.REFUSED, ""),
    ],
    ids=["apart", "stacked", "down alone", "half as wide"],
)
def test_check_judges_adapters_on_experts(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    stock: Outcome,
    plugin: Outcome,
    rule: str,
    size: int,
) -> None:
    save_config(tmp_path, CONFIG)
    import_classes(CONFIG)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["experts"],
        "peft_version": "0.21.2",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = check_adapter(str(tmp_path), str(tmp_path), tensor_parallel_size=size)
    assert (report.stock.outcome, report.plugin.outcome) == (stock, plugin), (
        report.stock.reason,
        report.plugin.reason,
    )
    assert rule in "; ".join(report.rules)
    assert bool(rule) == bool(report.rules)


def test_modules_of_a_vision_tower_are_left_out_not_refused(tmp_path: Path) -> None:
    model = next(model for model in MODELS if model.name == "Qwen3.5 multimodal")
    save_config(tmp_path, model.config)
    import_classes(model.config)
    files = checkpoint(model)
    for half, shape in (("lora_A", (6, 64)), ("lora_B", (192, 6))):
        files.tensors[f"base_model.model.model.visual.blocks.0.attn.qkv.{half}.weight"] = (
            torch.zeros(shape)
        )
    folder = files.save(tmp_path / "adapter")
    report = check_adapter(str(tmp_path), str(folder))
    assert report.plugin.outcome is Outcome.EXACT, report.plugin
    assert list(report.left_out.values()) == [["visual.blocks.*.attn.qkv"]]
