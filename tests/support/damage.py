"""Copies of adapter folders with a fault for which the plugin must refuse them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]


def copy_adapter(adapter: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy an adapter folder and apply ``change`` to the copy's tensors; return the copy."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    changed = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
    return folder


def cut_rows(tensors: Tensors) -> Tensors:
    """Remove two rows of the last module's LoRA-B."""
    name = max(name for name in tensors if "lora_B" in name)
    return tensors | {name: tensors[name][:-2]}


def drop_lora_a(tensors: Tensors) -> Tensors:
    """Remove the first module's LoRA-A."""
    name = min(name for name in tensors if "lora_A" in name)
    return {other: tensor for other, tensor in tensors.items() if other != name}


def insert_nan(tensors: Tensors) -> Tensors:
    """Write a NaN into the last tensor."""
    name = max(tensors)
    changed = tensors[name].clone()
    changed[0, 0] = float("nan")
    return tensors | {name: changed}


def rename_layer(tensors: Tensors) -> Tensors:
    """Rename the first layer's modules to a layer that the model does not have."""
    return {name.replace("layers.0.", "layers.90."): tensor for name, tensor in tensors.items()}


#: Change -> part of the refusal's message.
DAMAGES: dict[Callable[[Tensors], Tensors], str] = {
    cut_rows: "expected LoRA-",
    drop_lora_a: "it has LoRA-B but no LoRA-A",
    insert_nan: "has NaN or infinity",
    rename_layer: "this model has no such layer",
}
