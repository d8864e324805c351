"""One trained function in many layouts: how each producer of adapters writes it to a folder.

``layout_table.py`` lists the layouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: The rank of the function, and of each part of a module of several outputs.
RANK, PART_RANK = 6, 2
SCALING = 2.0
PREFIX = "base_model.model."

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Model:
    """A model class, and the modules of one trained function on it.

    Attributes:
        name: its name in messages.
        config: content of ``config.json``.
        modules: module in a checkpoint -> (rows, columns).
        parts: module -> its parts of one output each, in order: name -> rows. Without a name: the outputs
            that no producer writes, all after the others.
        fused: fused layer -> its modules, all in one parent.
        root: what precedes ``layers`` in a checkpoint's names.
        since: the first release that has the class and is tested here.
    """

    name: str
    config: Mapping[str, Any]
    modules: Mapping[str, tuple[int, int]]
    parts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    root: str = "model."
    since: str = "0.17.0"

    def function(self) -> Pairs:
        """Return a pair per module; modules of one fused layer share A, parts have their own ranks."""
        generator = torch.Generator().manual_seed(0)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-3, 4, shape, generator=generator).float()

        shared: dict[str, torch.Tensor] = {}
        for fused, names in self.fused.items():
            parent = fused.rpartition(".")[0]
            columns = self.modules[f"{parent}.{names[0]}"][1]
            shared |= dict.fromkeys([f"{parent}.{name}" for name in names], integers(RANK, columns))
        pairs = {}
        for module, (rows, columns) in self.modules.items():
            b = integers(rows, RANK)
            if parts := self.parts.get(module):
                own = [integers(size, PART_RANK) for name, size in parts.items() if name]
                folded = torch.block_diag(*own)
                b = torch.zeros(rows, folded.shape[1])
                b[: len(folded)] = folded
            pairs[module] = shared.get(module, integers(b.shape[1], columns)), b
        return pairs


@dataclass
class Files:
    """The content of an adapter's folder.

    Attributes:
        tensors: name -> tensor.
        config: ``adapter_config.json``.
        name: the file's name; with ``{}`` in it, two files with the parts' numbers.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    name: str = "adapter_model.safetensors"

    def save(self, folder: Path) -> Path:
        """Write the folder."""
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        if self.name.endswith((".bin", ".pt")):
            torch.save(tensors, folder / self.name)
        elif "{}" in self.name:
            names = sorted(tensors)
            for number, part in enumerate((names[::2], names[1::2]), start=1):
                save_file({name: tensors[name] for name in part}, folder / self.name.format(number))
        else:
            save_file(tensors, folder / self.name)
        return folder


@dataclass(frozen=True)
class Layout:
    """One way to write the function.

    Attributes:
        name: what is particular, for the table.
        producer: what writes it, for the table.
        write: returns the folder's content; None where the model has no such layout.
        served: how it is served, for the table; empty if it is refused.
        reason: a part of the refusal's text.
    """

    name: str
    producer: str
    write: Callable[[Model], Files | None]
    served: str = "exact"
    reason: str = ""


def plain(pairs: Pairs, **config: Any) -> Files:
    """Return the files that PEFT writes."""
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": tensor
        for module, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    names = sorted({module.rpartition(".")[2] for module in pairs})
    base = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": SCALING * RANK,
        "target_modules": names,
        "bias": "none",
        "peft_version": "0.21.2",
    }
    other = {m.rpartition(".")[2]: rank for m, rank in ranks.items() if rank != RANK}
    if other:
        base["rank_pattern"] = other
        base["alpha_pattern"] = {name: SCALING * rank for name, rank in other.items()}
    return Files(tensors, base | config)


def checkpoint(model: Model) -> Files:
    """The checkpoint's own modules and names."""
    return plain(model.function())


def renamed(old: str, new: str) -> Callable[[Model], Files | None]:
    def write(model: Model) -> Files | None:
        files = checkpoint(model)
        files.tensors = {re.sub(old, new, name): tensor for name, tensor in files.tensors.items()}
        return files

    return write


def rooted(root: str) -> Callable[[Model], Files | None]:
    """Return a writer that puts another path before ``layers``."""

    def write(model: Model) -> Files | None:
        files = checkpoint(model)
        files.tensors = {
            name.replace(f"{PREFIX}{model.root}layers", f"{PREFIX}{root}layers"): tensor
            for name, tensor in files.tensors.items()
        }
        return files

    return write


def parts(model: Model) -> Files | None:
    """One module per output, each with its own A and B."""
    if not model.parts:
        return None
    pairs: Pairs = {}
    for module, (a, b) in model.function().items():
        start = column = 0
        parent = module.rpartition(".")[0]
        for name, rows in model.parts.get(module, {}).items():
            if name:
                own = slice(column, column + PART_RANK)
                pairs[f"{parent}.{name}"] = a[own], b[start : start + rows, own]
                column = own.stop
            start += rows
        if module not in model.parts:
            pairs[module] = a, b
    return plain(pairs)


def coarse(model: Model) -> Files | None:
    """One tensor per fused layer."""
    if not model.fused:
        return None
    function = model.function()
    pairs: Pairs = {}
    for fused, names in model.fused.items():
        own = [function.pop(f"{fused.rpartition('.')[0]}.{name}") for name in names]
        pairs[fused] = own[0][0], torch.cat([b for _, b in own])
    return plain({**pairs, **function})


def kohya(model: Model) -> Files:
    """Modules with underscores, ``lora_down``, ``lora_up`` and ``alpha``."""
    tensors = {}
    for module, (a, b) in model.function().items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(SCALING * len(a))
    return Files(tensors, checkpoint(model).config | {"lora_alpha": 1})


def mlx(model: Model) -> Files:
    """Transposed tensors without a prefix, and a configuration of its own."""
    tensors = {}
    for module, (a, b) in model.function().items():
        tensors |= {f"{module}.lora_a": a.T, f"{module}.lora_b": b.T}
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": RANK, "scale": SCALING, "dropout": 0.0},
    }
    return Files(tensors, config, "adapters.safetensors")


def in_file(name: str) -> Callable[[Model], Files | None]:
    def write(model: Model) -> Files:
        files = checkpoint(model)
        files.name = name
        return files

    return write


def changed(change: Callable[[Files, str], None], **config: Any) -> Callable[[Model], Files | None]:
    """Return a writer that changes the checkpoint's files, given the name of one module."""

    def write(model: Model) -> Files:
        files = checkpoint(model)
        change(files, PREFIX + next(iter(model.modules)))
        files.config |= config
        return files

    return write


def nothing(files: Files, module: str) -> None:
    """Change the configuration only."""


def adding(suffix: str, *shape: int) -> Callable[[Files, str], None]:
    def add(files: Files, module: str) -> None:
        files.tensors[f"{module}.{suffix}"] = torch.ones(shape)

    return add


def megatron(model: Model) -> Files:
    files = checkpoint(model)
    module, tensor = next(iter(files.tensors.items()))
    del files.tensors[module], files.tensors[module.replace("lora_A", "lora_B")]
    name = f"{PREFIX}decoder.layers.0.self_attention.linear_qkv"
    files.tensors[f"{name}.lora_A.weight"] = tensor
    files.tensors[f"{name}.lora_B.weight"] = torch.ones(4, len(tensor))
    return files
