# SPDX-License-Identifier: Apache-2.0
"""vLLM's LoRA layers of experts without a kernel: their constructors want one, which needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.lora.layers import fused_moe


@contextmanager
def without_kernels(device: str = "meta") -> Iterator[None]:
    """Build LoRA layers of experts without kernels, with their slots on ``device``.

    Their sizes, slots, slices and checks are vLLM's own; they cannot compute. The slots of a large model
    are gigabytes; on the meta device they take no memory.
    """
    layer_class = fused_moe.FusedMoEWithLoRA
    build = layer_class.__init__

    def init(self: Any, base_layer: Any) -> None:
        for owner in (base_layer, getattr(base_layer, "routed_experts", None)):
            if owner is not None and hasattr(owner, "quant_method"):
                delattr(owner, "quant_method")  # it can be a submodule
                owner.quant_method = mock.MagicMock(is_monolithic=False)
                if hasattr(fused_moe, "LoRAExpertsMixin"):
                    experts = mock.MagicMock(spec=fused_moe.LoRAExpertsMixin)
                    owner.quant_method.moe_kernel.fused_experts = experts
        build(self, base_layer)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(layer_class, "__init__", init))
        if hasattr(layer_class, "_inject_lora_into_fused_moe"):  # to 0.21
            stack.enter_context(mock.patch.object(layer_class, "_inject_lora_into_fused_moe"))
        where = mock.Mock(return_value=torch.device(device))
        stack.enter_context(mock.patch.object(fused_moe, "_get_lora_device", where))
        if hasattr(fused_moe, "FusedMoEKernelModularImpl"):
            stack.enter_context(mock.patch.object(fused_moe, "FusedMoEKernelModularImpl", object))
        stack.enter_context(mock.patch.object(fused_moe, "FusedMoEModularMethod"))
        yield
