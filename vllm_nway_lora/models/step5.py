# SPDX-License-Identifier: Apache-2.0
"""Step5: LoRA under ``fully_sharded_loras`` on its two layers, and the shapes of their modules.

Source: models/step5/nvidia/model.py and lora/layers/custom_layer.py, 0.33.0; older releases lack it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


class _WithUnshardedLoRAA(nn.Module):
    """Mixin before one of vLLM's LoRA layer classes: serves it under ``fully_sharded_loras`` too.

    Each rank has all of LoRA-A, as without that setting, so nothing is gathered.
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
        """Return True for a layer that vLLM's class refuses only because of ``fully_sharded_loras``."""
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
    """Return the LoRA layer classes for Step5; none on releases before 0.33.0."""
    try:
        from vllm.lora.layers.custom_layer import (
            Step5FusedQKVIndexerWithLoRA,
            Step5SparseIndexerWWithLoRA,
        )
    except ImportError:
        return ()
    return tuple(
        type(f"Unsharded{vllm_class.__name__}", (_WithUnshardedLoRAA, vllm_class), {})
        for vllm_class in (Step5FusedQKVIndexerWithLoRA, Step5SparseIndexerWWithLoRA)
    )


def module_shapes(model: nn.Module, name: str, layer: Any) -> Sequence[tuple[int, int]]:
    """Return per module ``(input size, rows over all ranks)`` of one of Step5's two layers.

    Returns nothing for any other layer. The loaders of these two read each part at an offset and
    ignore the rows behind it, so that a wrong number of rows raises no error there.

    Args:
        model: the model that contains the layer.
        name: the layer's path in the model.
        layer: the layer, wrapped for LoRA or not.
    """
    base: Any = getattr(layer, "base_layer", None)
    kind = type(base).__name__
    if kind == "Step5SparseIndexerIndexTPLinear":
        return [(base.input_size, base.output_size)]
    if kind != "Step5FusedQKVIndexerLinear":
        return []
    # Only the indexer's other layer knows how many heads the indexer has over all ranks.
    other: Any = model.get_submodule(f"{name.rpartition('.')[0]}.sparse_indexer_w")
    heads = getattr(other, "base_layer", other).output_size
    q, kv = base.total_num_heads * base.head_size, base.total_num_kv_heads * base.head_size
    index_kv = base.local_index_k_size * base.tp_size // base.index_kv_head_replicas
    gate = base.local_gate_size * base.tp_size
    rows = (q, kv, kv, heads * base.proxy_dim, index_kv, index_kv, gate)
    return [(base.input_size, count) for count in rows]
