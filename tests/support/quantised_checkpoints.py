"""Checkpoints with weights of four bits in the layouts of GPTQ, AWQ and compressed-tensors.

The weights are rounded to the nearest value, in groups of columns. Each quantised checkpoint has a
float one with the same weights, on which PEFT computes the reference.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.oracle_cases import read_checkpoint

BITS, GROUP = 4, 32
#: Modules that keep their weights: in published checkpoints, or too narrow for the CPU kernel.
_KEPT = re.compile(r"(lm_head|embed_tokens|conv1d|norm|in_proj_[ab])\.weight$")
#: The order in which AWQ packs eight columns into one integer.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A weight of four bits: ``scale * (value - zero)`` for each group of a row's columns.

    Attributes:
        values: -8 to 7, of shape ``(rows, columns)``, int8.
        scales: ``(rows, groups)``, of four bits, so that bfloat16 represents each weight exactly.
        zeros: likewise, int8.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def to_float(self) -> torch.Tensor:
        """Return the weight in float32."""
        grouped = self.values.unflatten(1, (-1, GROUP)).float() - self.zeros[..., None]
        return (grouped * self.scales[..., None]).flatten(1)


def round_weight(weight: torch.Tensor, symmetric: bool) -> Rounded:
    """Return a weight rounded to four bits."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        scales = _shorten(grouped.abs().amax(-1) / 7)
        zeros = torch.zeros_like(scales)
    else:
        scales = _shorten((high - low) / 15)
        zeros = (-8 - low / scales).round().clamp(-8, 7)
    values = (grouped / scales[..., None] + zeros[..., None]).round().clamp(-8, 7)
    return Rounded(values.flatten(1).to(torch.int8), scales, zeros.to(torch.int8))


def _shorten(scales: torch.Tensor) -> torch.Tensor:
    """Return the next higher numbers of four bits."""
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp((mantissa * 16).ceil() / 16, exponent)


def _pack(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return -8 to 7, as 0 to 15, packed by eight along ``dimension``."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(values, BITS, dimension).contiguous()


def _gptq(weight: Rounded) -> Tensors:
    groups = weight.scales.shape[1]
    return {
        "qweight": _pack(weight.values.T, 0),
        # GPTQ stores the zero less one.
        "qzeros": _pack(weight.zeros.T - 1, 1),
        "scales": weight.scales.T.bfloat16().contiguous(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(GROUP),
    }


def _awq(weight: Rounded) -> Tensors:
    def pack(values: torch.Tensor) -> torch.Tensor:
        return _pack(values.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1), 1)

    return {
        "qweight": pack(weight.values.T),
        "qzeros": pack(weight.zeros.T),
        "scales": weight.scales.T.bfloat16().contiguous(),
    }


def _compressed_tensors(weight: Rounded) -> Tensors:
    return {
        "weight_packed": _pack(weight.values, 1),
        "weight_scale": weight.scales.bfloat16(),
        "weight_shape": torch.tensor(weight.values.shape),
    }


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores its weights.

    Attributes:
        name: its usual name.
        pack: returns the tensors of one module.
        config: returns its ``quantization_config``, from the modules that are quantised and the linear
            modules that keep their weights.
        symmetric: every zero is 0.
    """

    name: str
    pack: Callable[[Rounded], Tensors]
    config: Callable[[list[str], list[str]], dict[str, Any]]
    symmetric: bool = True


LAYOUTS = (
    Layout(
        "GPTQ",
        _gptq,
        lambda quantised, kept: {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
            "lm_head": False,
            # Without paths: vLLM's Granite 4 calls `mamba` `mixer` here.
            "modules_in_block_to_quantize": [sorted({m.rpartition(".")[2] for m in quantised})],
        },
    ),
    Layout(
        "AWQ",
        _awq,
        lambda quantised, kept: {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept,
        },
        symmetric=False,
    ),
    Layout(
        "compressed-tensors W4A16",
        _compressed_tensors,
        lambda quantised, kept: {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": BITS,
                        "type": "int",
                        "strategy": "group",
                        "group_size": GROUP,
                        "symmetric": True,
                        "dynamic": False,
                    },
                    "input_activations": None,
                }
            },
            "ignore": kept,
        },
    ),
)


def save_quantised(source: Path, root: Path, layout: Layout) -> tuple[Path, Path]:
    """Save a checkpoint with quantised weights, and the same weights in float32; return both folders.

    Args:
        source: a checkpoint in bfloat16.
        root: the folder for both.
        layout: the layout.
    """
    packed: Tensors = {}
    floats: Tensors = {}
    quantised, kept = [], []
    for name, weight in read_checkpoint(source):
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or _KEPT.search(name):
            packed[name], floats[name] = weight, weight.float()
            if weight.dim() == 2 and "embed" not in name:
                kept.append(module)
            continue
        quantised.append(module)
        rounded = round_weight(weight, layout.symmetric)
        packed |= {f"{module}.{part}": t for part, t in layout.pack(rounded).items()}
        floats[name] = rounded.to_float()
    changes = {"quantization_config": layout.config(quantised, kept)}
    return (
        _save(source, root / "quantised", packed, changes),
        _save(source, root / "float", floats, {"dtype": "float32"}),
    )


def _save(source: Path, folder: Path, tensors: Tensors, changes: dict[str, Any]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
