# SPDX-License-Identifier: Apache-2.0
"""Replace the punica wrapper that vLLM's LoRA layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The class that is replaced. Its subclasses belong to platforms outside vLLM.
_REPLACED = ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU")


def get_punica_wrapper(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    """Return the wrapper for LoRA layers, on CPU with grouped products; wraps vLLM's function."""
    return group_by_adapter(wrapped(*args, **kwargs))


def group_by_adapter(punica_wrapper: Any) -> Any:
    """Return vLLM's CPU wrapper with products grouped by adapter; return any other unchanged."""
    found = type(punica_wrapper)
    if (found.__module__, found.__qualname__) != _REPLACED:
        return punica_wrapper
    # Imported only where vLLM has the class and uses it.
    from vllm_nway_lora.layers.cpu_punica import GroupedPunicaWrapper

    return GroupedPunicaWrapper.take_over(punica_wrapper)
