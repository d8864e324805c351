"""What LoRA on vLLM's CPU platform lacks in some releases, and only tests need."""

from __future__ import annotations

import inspect


def unpin() -> None:
    """Keep vLLM 0.21.0-0.23.0 from pinning memory for LoRA's token mapping without any GPU.

    ``async_tensor_h2d`` (vllm/utils/torch_utils.py) pins unless told not to; LoRA calls it so from
    0.22.0 on (vllm/lora/punica_wrapper/utils.py). 0.24.0 asks the platform.
    """
    from vllm.utils import torch_utils

    function = torch_utils.async_tensor_h2d
    if "pin_memory" in inspect.signature(function).parameters:
        function.__defaults__ = (False,)
