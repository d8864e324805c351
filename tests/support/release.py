"""What engines of any release are tested with: a checkpoint, its adapters and PEFT's answers."""

from __future__ import annotations

from pathlib import Path

import vllm
from packaging.version import Version

from support import adapters
from support.adapters import FUSED_LLAMA, QWEN3_5, Served
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


def make(root: Path) -> Served:
    """Save what the running vLLM is to serve below ``root``."""
    if Version(vllm.__version__) >= releases.QWEN3_5_TEXT:
        return adapters.make(root, save_qwen3_5, QWEN3_5)
    return adapters.make(root, save_fused_llama, FUSED_LLAMA)


def stock_messages(adapter: str) -> tuple[str, ...] | None:
    """Return what the running vLLM, without the plugin, says of an adapter.

    None where it serves the adapter rightly, nothing where it serves it wrongly.
    """
    if adapter not in DEFECTS:
        return None
    return releases.defect(DEFECTS[adapter]).messages(vllm.__version__)
