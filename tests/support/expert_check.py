"""Adapters on the experts of a tiny Qwen3-MoE, as ``check`` reads them: their numbers do not matter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.families.family import COMMON

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
        f"{PATH}.base_layer.lora_A.weight": torch.ones(flat, HIDDEN),
        f"{PATH}.base_layer.lora_B.weight": torch.ones(2 * intermediate, flat),
        f"{PATH}.lora_A.weight": torch.ones(flat, intermediate),
        f"{PATH}.lora_B.weight": torch.ones(HIDDEN, flat),
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
            tensors[f"{module}.lora_A.weight"] = torch.ones(RANK, columns)
            tensors[f"{module}.lora_B.weight"] = torch.ones(rows, RANK)
    return tensors


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write the tensors and their configuration; return ``folder``."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["experts"],
        "peft_version": "0.21.2",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
