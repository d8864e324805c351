# SPDX-License-Identifier: Apache-2.0
"""Build a model's class where vLLM wants a GPU: its layers have the same rows, and compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import vllm.platforms
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.triton_utils import triton


class _AnyExperts:
    """A platform with kernels for experts that have no gate (Nemotron 3)."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_xpu(self) -> bool:
        """Return True. Experts' configuration asks this, and no other decision of it depends on it."""
        return True


@contextmanager
def without_gpu(device: str) -> Iterator[None]:
    """Within this context, constructors of models do not ask for a GPU.

    Args:
        device: the device that constructors find as the current one.
    """
    platform: Any = vllm.platforms.current_platform
    choose = platform.get_attn_backend_cls

    def choose_attention(*args: Any, attn_selector_config: Any, **kwargs: Any) -> Any:
        try:
            return choose(*args, attn_selector_config=attn_selector_config, **kwargs)
        except NotImplementedError:  # sparse attention (DeepSeek-V3.2, GLM-5)
            dense = attn_selector_config._replace(use_sparse=False)
            return choose(*args, attn_selector_config=dense, **kwargs)

    patches: list[Any] = [
        # Some classes name the device themselves and compute on it in their constructor.
        mock.patch.object(platform, "current_device", return_value=device, create=True),
        mock.patch.object(platform, "get_attn_backend_cls", choose_attention),
        # Older builds of Triton, and vLLM's stand-in for it, lack this function (OLMo hybrid).
        mock.patch.object(triton, "set_allocator", create=True),
    ]
    if hasattr(fused_moe_config, "current_platform"):  # from 0.18.0 on
        experts = mock.patch.object(fused_moe_config, "current_platform", _AnyExperts(platform))
        patches.append(experts)
    if not torch.cuda.is_available():
        # Kimi-Linear: its constructor asks for a stream and for events.
        patches += [mock.patch(f"torch.cuda.{n}", return_value=None) for n in ("Stream", "Event")]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
