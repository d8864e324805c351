# SPDX-License-Identifier: Apache-2.0
"""Layers with two names in their model: one LoRA layer for both names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA


def create_lora_modules(wrapped: Callable[..., None], manager: Any, args: Any, kwargs: Any) -> None:
    """Create the LoRA layers, one per base layer; wraps ``LoRAModelManager._create_lora_modules``.

    Until 0.21.0 vLLM wraps a layer with two names in its model once per name (the MLA projections:
    ``self_attn.X`` and ``self_attn.mla_attn.X``). Adapters use the first name, the forward uses the
    second. From 0.22.0 on both names lead to the first LoRA layer, as they do here.
    """
    wrapped(*args, **kwargs)
    first: dict[int, Any] = {}
    for name, module in list(manager.modules.items()):
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        if id(module.base_layer) not in first:
            first[id(module.base_layer)] = module
            continue
        parent, _, child = name.rpartition(".")
        setattr(manager.model.get_submodule(parent), child, first[id(module.base_layer)])
        # No adapter has tensors under this name, so vLLM would reset what the first name has set.
        del manager.modules[name]
        manager.packed_modules.pop(name, None)
