"""One family of the oracle and its random checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.checkpoints import VOCAB_SIZE, WEIGHT_STD

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One model class.

    Attributes:
        name: its name in the results.
        config: content of ``config.json``.
        dtype: the engine's; float32 where the CPU kernels have it.
        engine: further options of the engine.
        experts: it has experts, whose kernel with LoRA is replaced (``oracle_moe``).
        weights: name -> shape of the checkpoint's weights; ``{}`` in a name stands for each layer's
            number. Empty: transformers has the class, and saves the checkpoint.
        transposed: last names of the modules whose weights a checkpoint stores as input by output.
    """

    name: str
    config: Mapping[str, Any]
    dtype: str = "float32"
    engine: Mapping[str, Any] = field(default_factory=dict)
    experts: bool = False
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()


def save_checkpoint(family: Family, folder: Path) -> None:
    """Save a checkpoint with random matrices, in the family's dtype."""
    folder.mkdir(parents=True)
    config = folder / "config.json"
    config.write_text(json.dumps(family.config))
    torch.manual_seed(0)
    dtype = getattr(torch, family.dtype)
    if family.weights:
        save_file({n: w.to(dtype) for n, w in _draw(family).items()}, folder / "model.safetensors")
    else:
        _save_with_transformers(folder, dtype)
    config.write_text(json.dumps({**family.config, "dtype": family.dtype}))


def _draw(family: Family) -> dict[str, torch.Tensor]:
    layers = range(family.config["num_hidden_layers"])
    weights = {}
    for name, shape in family.weights.items():
        for path in dict.fromkeys(name.format(layer) for layer in layers):
            weights[path] = torch.randn(shape) * WEIGHT_STD if len(shape) > 1 else torch.ones(shape)
    return weights


@torch.no_grad()
def _save_with_transformers(folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    for name, parameter in model.named_parameters():
        # Not the transition matrices of state spaces.
        is_zero = name.endswith("correct_output_scale")  # Gemma 3n's, at first
        is_matrix = parameter.dim() > 1 and not name.endswith("A_log")
        if is_matrix or is_zero or name.endswith("bias"):
            parameter.normal_(0, WEIGHT_STD)
    model.save_pretrained(folder)
