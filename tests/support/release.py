"""What engines of any release are tested with: a checkpoint, its adapters and PEFT's answers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import vllm
from packaging.version import Version

from support.adapters import FUSED_LLAMA, QWEN3_5, Reference, save_adapter
from support.checkpoints import save_fused_llama, save_qwen3_5
from vllm_nway_lora import releases

#: Adapter -> the defect that stock vLLM serves it with, where it has one.
DEFECTS = {
    "qkv+z": "fewer-modules-than-outputs",
    "qkv": "last-module-left-out",
    "z": "first-module-left-out",
    "all": "fewer-modules-than-outputs",
    "ba": "one-module-cut-in-halves",
}


class Served(NamedTuple):
    checkpoint: Path
    adapters: dict[str, Path]
    reference: Reference


def make(root: Path) -> Served:
    """Save what the running vLLM is to serve below ``root``."""
    qwen = Version(vllm.__version__) >= releases.QWEN3_5_ON_CPU
    checkpoint = (save_qwen3_5 if qwen else save_fused_llama)(root / "model")
    adapters = {
        name: save_adapter(checkpoint, root / name, modules, seed)
        for seed, (name, modules) in enumerate((QWEN3_5 if qwen else FUSED_LLAMA).items())
    }
    return Served(checkpoint, adapters, Reference(checkpoint, adapters))


def stock_messages(adapter: str) -> tuple[str, ...] | None:
    """Return what the running vLLM, without the plugin, says of an adapter.

    None where it serves the adapter rightly, nothing where it serves it wrongly.
    """
    if adapter not in DEFECTS:
        return None
    return releases.defect(DEFECTS[adapter]).messages(vllm.__version__)
