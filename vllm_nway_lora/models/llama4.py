# SPDX-License-Identifier: Apache-2.0
"""Llama 4: its ``load_weights`` permutes the rows of q and k before a layer's weight loader runs.

Source: model_executor/models/llama4.py, ``permute_qk_weight_for_rotary``, 0.17.1 to 0.33.0. A
checkpoint stores the two channels of each rotation side by side. vLLM stores the first channel of
every pair in the first half of a head and the second channel in the second half.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_nway_lora.rows.notes import set_notes


def prepare(model: nn.Module) -> None:
    """Note on the fused projections the row order that their weight loaders receive."""
    for attention in model.modules():
        if type(attention).__name__ != "Llama4Attention":
            continue
        source_rows = {
            output: torch.arange(heads * attention.head_dim)
            .view(heads, attention.head_dim // 2, 2)
            .transpose(1, 2)
            .flatten()
            for output, heads in enumerate(
                (attention.total_num_heads, attention.total_num_kv_heads)
            )
        }
        set_notes(attention.qkv_proj, source_rows=source_rows)
