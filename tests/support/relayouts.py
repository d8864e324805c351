"""Adapters that PEFT has saved for Qwen3.5, written again in other layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_FILE = "adapter_model.safetensors"


def _save(source: Path, folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    saved = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / _FILE)
    return folder


def _pair(tensors: Tensors, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")


def bare_names(source: Path, folder: Path) -> Path:
    """The names of a bare text model, below ``torch.compile``'s wrapper, with the adapter's own name."""
    tensors = {
        name.replace("base_model.model.model.", "_orig_mod.").replace(
            ".weight", ".default.weight"
        ): t
        for name, t in load_file(source / _FILE).items()
    }
    return _save(source, folder, tensors)


def parts(source: Path, folder: Path) -> Path:
    """in_proj_q, in_proj_k and in_proj_v in place of in_proj_qkv."""
    tensors = load_file(source / _FILE)
    for name in [n for n in tensors if n.endswith("in_proj_qkv.lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = _pair(tensors, module)
        value = b.shape[0] // 2  # as many rows as q and k together
        for letter, rows in zip("qkv", b.split([value // 2, value // 2, value]), strict=True):
            part = f"{module.removesuffix('qkv')}{letter}"
            tensors |= {f"{part}.lora_A.weight": a.clone(), f"{part}.lora_B.weight": rows}
    return _save(source, folder, tensors)


def fused(source: Path, folder: Path) -> Path:
    """in_proj_qkvz in place of in_proj_qkv and in_proj_z, with both ranks."""
    tensors = load_file(source / _FILE)
    rank = 0
    for name in [n for n in tensors if n.endswith("in_proj_z.lora_A.weight")]:
        parent = name.removesuffix("in_proj_z.lora_A.weight")
        (a, b), (a_z, b_z) = (_pair(tensors, f"{parent}in_proj_{of}") for of in ("qkv", "z"))
        rank = len(a) + len(a_z)
        tensors[f"{parent}in_proj_qkvz.lora_A.weight"] = torch.cat([a, a_z])
        tensors[f"{parent}in_proj_qkvz.lora_B.weight"] = torch.block_diag(b, b_z)
    return _save(source, folder, tensors, r=rank, lora_alpha=2 * rank)


#: Layout -> the adapter of ``QWEN3_5`` that is written again, and how.
RELAYOUTS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "names of the bare model": ("all", bare_names),
    "parts": ("qkv", parts),
    "fused layer": ("qkv+z", fused),
}
