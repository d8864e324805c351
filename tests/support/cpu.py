"""Workarounds for LoRA on vLLM's CPU platform that only tests need."""

from __future__ import annotations

import inspect


def disable_pinned_memory() -> None:
    """Stop vLLM 0.21.0-0.23.0 from pinning memory for LoRA's token mapping on a machine without a GPU.

    ``async_tensor_h2d`` (vllm/utils/torch_utils.py) pins by default; LoRA calls it with the default
    from 0.22.0 on (vllm/lora/punica_wrapper/utils.py). 0.24.0 asks the platform.
    """
    from vllm.utils import torch_utils

    function = torch_utils.async_tensor_h2d
    if "pin_memory" in inspect.signature(function).parameters:
        function.__defaults__ = (False,)
