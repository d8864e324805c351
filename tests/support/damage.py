"""Adapters on disk, changed so that they must be refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]


def copy(adapter: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy an adapter's folder, its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    changed = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file)
    return folder


def cut_rows(tensors: Tensors) -> Tensors:
    """Take two rows off the last module's B."""
    name = max(name for name in tensors if "lora_B" in name)
    return tensors | {name: tensors[name][:-2]}


def drop_a(tensors: Tensors) -> Tensors:
    """Leave out the first module's A."""
    name = min(name for name in tensors if "lora_A" in name)
    return {other: tensor for other, tensor in tensors.items() if other != name}


def poison(tensors: Tensors) -> Tensors:
    """Put a NaN into the last tensor."""
    name = max(tensors)
    poisoned = tensors[name].clone()
    poisoned[0, 0] = float("nan")
    return tensors | {name: poisoned}


def misname(tensors: Tensors) -> Tensors:
    """Move the first layer's modules to a layer that the model does not have."""
    return {name.replace("layers.0.", "layers.90."): tensor for name, tensor in tensors.items()}


#: Change -> words of the refusal.
DAMAGES: dict[Callable[[Tensors], Tensors], str] = {
    cut_rows: "expected LoRA-",
    drop_a: "it has LoRA-B but no LoRA-A",
    poison: "has NaN or infinity",
    misname: "this model has no such layer",
}
