# SPDX-License-Identifier: Apache-2.0
"""Llama 4: rows of q and k that its ``load_weights`` moves before any layer's weight loader sees them.

Source: model_executor/models/llama4.py, ``permute_qk_weight_for_rotary``, 0.17.1 to 0.33.0. A
checkpoint has the two channels of each rotation beside each other; vLLM has the first of each pair in
the first half of a head, and the second in the second.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_nway_lora.probe import HANDED_ROWS_ATTRIBUTE


def prepare(model: nn.Module) -> None:
    """Note on the fused projections which rows their loaders are handed."""
    for attention in model.modules():
        if type(attention).__name__ != "Llama4Attention":
            continue
        handed = {
            output: torch.arange(heads * attention.head_dim)
            .view(heads, attention.head_dim // 2, 2)
            .transpose(1, 2)
            .flatten()
            for output, heads in enumerate(
                (attention.total_num_heads, attention.total_num_kv_heads)
            )
        }
        setattr(attention.qkv_proj, HANDED_ROWS_ATTRIBUTE, handed)
