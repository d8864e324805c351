# SPDX-License-Identifier: Apache-2.0
"""Muse Spark: its attention's q, k, v and output gate in one layer that vLLM takes no LoRA on.

Source: models/muse_spark/common/layers.py (``MuseSpark1xQKVOGateParallelLinear``, which is no merged
layer to vLLM and says nothing of its parts), nvidia/model.py and amd/model.py, 0.33.0. There
``load_weights`` pairs up the halves of q's and k's heads before the layer's loader sees them, and the
class takes its ``qkv_proj`` out of ``packed_modules_mapping``.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_nway_lora.probe import HANDED_ROWS_ATTRIBUTE, SHARDS_ATTRIBUTE

_MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj")


def prepare(model: nn.Module) -> dict[str, list[str]]:
    """Note how the fused projections of ``model`` are laid out; return their mapping, if it has any."""
    found: dict[str, list[str]] = {}
    for projection in model.modules():
        if type(projection).__name__ != "MuseSpark1xQKVOGateParallelLinear":
            continue
        q, kv = (
            heads * projection.tp_size * projection.head_size
            for heads in (projection.num_heads, projection.num_kv_heads)
        )
        sizes = {"q": q, "k": kv, "v": kv, "o_gate": q}
        setattr(projection, SHARDS_ATTRIBUTE, list(sizes.items()))
        handed = {
            output: torch.arange(rows)
            .view(-1, 2, projection.head_size // 2)
            .transpose(1, 2)
            .flatten()
            for output, rows in enumerate((q, kv))
        }
        setattr(projection, HANDED_ROWS_ATTRIBUTE, handed)
        found["qkv_proj"] = list(_MODULES)
    return found
