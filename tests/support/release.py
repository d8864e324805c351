"""The checkpoint and adapters that one engine per release is tested with, and its expected errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from support.adapters import FUSED_LLAMA, QWEN3_5, ServedModel, save_served_model
from support.checkpoints import save_fused_llama, save_qwen3_5
from vllm_nway_lora.compat import defects

#: The first release with a text-only Qwen3.5 class (model_executor/models/registry.py). The engine
#: tests serve that class, and a model of their own on older releases.
HAS_QWEN3_5_TEXT = Version(vllm.__version__) >= Version("0.27.0")
needs_qwen3_5_text = pytest.mark.skipif(
    not HAS_QWEN3_5_TEXT, reason="vLLM has no text-only Qwen3.5 class before 0.27.0"
)

#: Adapter -> the defect of stock vLLM that affects it. Adapters without a defect are not listed.
DEFECTS = {
    "qkv+z": "fewer-modules-than-outputs",
    "qkv": "last-module-left-out",
    "z": "first-module-left-out",
    "all": "fewer-modules-than-outputs",
    "ba": "one-module-cut-in-halves",
}


def save_model_of_release(root: Path) -> ServedModel:
    """Save a checkpoint that the running vLLM can serve, and its adapters, below ``root``."""
    if HAS_QWEN3_5_TEXT:
        return save_served_model(root, save_qwen3_5, QWEN3_5)
    return save_served_model(root, save_fused_llama, FUSED_LLAMA)


def find_stock_messages(adapter: str) -> tuple[str, ...] | None:
    """Return parts of the error with which the running vLLM, without the plugin, refuses an adapter.

    Returns:
        None if stock vLLM serves the adapter correctly; an empty tuple if it silently produces wrong
        output.
    """
    if adapter not in DEFECTS:
        return None
    return defects.find(DEFECTS[adapter]).messages(vllm.__version__)
