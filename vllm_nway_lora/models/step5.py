# SPDX-License-Identifier: Apache-2.0
"""Layers that vLLM serves without ``fully_sharded_loras`` only, served under it with LoRA-A whole."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class _KeepsLoRAAWhole(nn.Module):
    """Mixin before one of vLLM's LoRA layer classes: what it does, under ``fully_sharded_loras`` too.

    Each rank has all of LoRA-A, as without that setting, and so nothing is gathered.
    """

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        super().create_lora_weights(max_loras, _without_sharding(lora_config), model_config)

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: nn.Module,
        lora_config: Any,
        packed_modules_list: list[str],
        model_config: Any = None,
        **_: Any,
    ) -> bool:
        """Return True for a layer that vLLM's class takes, but for ``fully_sharded_loras``."""
        return bool(
            lora_config.fully_sharded_loras
            and super().can_replace_layer(
                source_layer, _without_sharding(lora_config), packed_modules_list, model_config
            )
        )


def _without_sharding(lora_config: Any) -> Any:
    lora_config = copy.copy(lora_config)
    lora_config.fully_sharded_loras = False
    return lora_config


def layer_classes() -> tuple[type, ...]:
    """Return the classes for this release's layers; vLLM before 0.33.0 has none of them."""
    try:
        from vllm.lora.layers.custom_layer import (
            Step5FusedQKVIndexerWithLoRA,
            Step5SparseIndexerWWithLoRA,
        )
    except ImportError:
        return ()
    return tuple(
        type(f"Unsharded{theirs.__name__}", (_KeepsLoRAAWhole, theirs), {})
        for theirs in (Step5FusedQKVIndexerWithLoRA, Step5SparseIndexerWWithLoRA)
    )
