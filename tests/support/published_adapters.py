"""Adapters that PEFT makes on transformers' class of a configuration, on the meta device.

Their files have headers, and one number that is not zero in each tensor; the rest is a hole.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RANK = 8
#: PEFT doubles the rank of experts' gate and up projections if it adapts them by their old names.
MOST_RANK = 16
#: PEFT stacks the ranks of all experts in one tensor.
EXPERTS_RANK = 2
USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
)
#: Modules of gated delta nets, Mamba2 mixers and short convolutions.
MIXER = (
    *("in_proj", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    *("in_proj_qkvz", "in_proj_ba", "q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj"),
)
_MIXER_PARENTS = "linear_attn|mamba|mixer|conv"
_MIXERS = rf"\.({_MIXER_PARENTS})\.(\w+)$"

#: The name of a class in transformers, where it is not the published one.
_NAMES = {"KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration"}
#: The modules that PEFT refuses on these model types (``constants.MAMBA_MODEL_TYPES``).
_NOT_IN_PEFT = {"falcon_h1": ["out_proj"], "nemotron_h": ["out_proj"]}

_ONE = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def build(config: Mapping[str, Any]) -> torch.nn.Module:
    """Build transformers' class of a configuration, on the meta device.

    Raises:
        Exception: transformers has no such class, or does not build it.
    """
    import transformers

    [architecture] = config["architectures"]
    model_class = getattr(transformers, _NAMES.get(architecture, architecture))
    fields = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    if isinstance(fields.get("text_config"), Mapping):
        text = fields["text_config"].items()
        fields["text_config"] = {k: v for k, v in text if k != "quantization_config"}
    with torch.device("meta"):
        model: torch.nn.Module = model_class(model_class.config_class.from_dict(fields))
    return model


def choose_targets(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Return the adapters for a model: name -> arguments of PEFT's ``LoraConfig``."""
    refused = _NOT_IN_PEFT.get(model.config.model_type, [])
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in refused
    ]
    ends = {name.rpartition(".")[2] for name in linear}
    found: dict[str, dict[str, Any]] = {"all linear": {"target_modules": "all-linear"}}
    if refused:
        found["all linear"]["exclude_modules"] = refused
    if usual := [name for name in USUAL if name in ends]:
        found["usual seven"] = {"target_modules": _select(model, usual)}
    if not {"q_proj", "k_proj", "v_proj"} <= ends:
        found["attention"] = {"target_modules": [name for name in ATTENTION if name in ends]}
    if mixers := {match[2] for name in linear if (match := re.search(_MIXERS, name))} & {*MIXER}:
        pattern = rf".*\.({_MIXER_PARENTS})\.({'|'.join(sorted(mixers))})"
        found["mixer"] = {"target_modules": pattern}
    stacked = [
        name for name, of in model.named_parameters() if of.ndim == 3 and ".experts." in name
    ]
    if stacked:
        names = sorted({re.sub(r".*\.layers\.\d+\.", "", name) for name in stacked})
        found["experts"] = {"target_parameters": names, "target_modules": [], "r": EXPERTS_RANK}
    return found


def _select(model: torch.nn.Module, ends: list[str]) -> list[str] | str:
    """Return PEFT's ``target_modules`` for names: of the text model alone, where another part has
    modules of these names that PEFT does not adapt (Gemma 4)."""
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ends]
    if all(isinstance(module, torch.nn.Linear) for module in named):
        return ends
    return rf".*\.language_model\..*\.({'|'.join(ends)})"


def write(config: Mapping[str, Any], of: Mapping[str, Any], folder: Path) -> Path:
    """Write the adapter that PEFT makes with the arguments ``of``; return its folder."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    rank = of.get("r", RANK)
    lora = LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", **of})
    adapted = get_peft_model(build(config), lora, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    written = adapted.peft_config["default"]
    written.inference_mode = True
    folder.mkdir(parents=True)
    written.save_pretrained(folder)
    save_holes({name: tuple(tensor.shape) for name, tensor in state.items()}, folder)
    return folder


def save_holes(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Write a safetensors file of bfloat16 tensors. The first number of each is one, the others are zero."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for entry in entries.values():
            file.seek(begin + entry["data_offsets"][0])
            file.write(_ONE)
    os.truncate(path, begin + end)
