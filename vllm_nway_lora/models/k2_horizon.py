# SPDX-License-Identifier: Apache-2.0
"""K2-Horizon: its ``load_weights`` permutes rows before a layer's weight loader runs.

Source: model_executor/models/k2_horizon.py, 0.33.0. It permutes the rows of q and k within each head,
so that the channels of a partial rotary embedding are contiguous. It repeats k's heads if there are
fewer of them than tensor-parallel ranks. The layer's own loader does neither.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from vllm_nway_lora.rows.notes import set_notes

_ATTENTIONS = ("K2HorizonAttention", "K2HorizonMoVAAttention")


def prepare(model: nn.Module) -> None:
    """Note the row order of the fused projections, and refusals on the value experts."""
    for attention in model.modules():
        if type(attention).__name__ not in _ATTENTIONS:
            continue
        for name in ("qk_proj", "qkv_proj"):
            if hasattr(attention, name):
                _note_row_order(attention, getattr(attention, name), repeats_k=name == "qk_proj")
        for number, expert in enumerate(getattr(attention, "v_experts", ())):
            reason = "the model reads its weight directly, together with those of the other value experts"
            set_notes(expert, refusals={str(number): reason})


def _note_row_order(attention: Any, projection: Any, *, repeats_k: bool) -> None:
    rows = [
        torch.arange(heads * attention.head_dim).view(heads, -1)
        for heads in (attention.total_num_heads, attention.total_num_kv_heads)
    ]
    if attention.fold_rope_weights:
        permutation = sys.modules[type(attention).__module__]._rope_weight_perm(
            attention.head_dim, attention.rope_head_dim
        )
        rows = [head_rows[:, permutation] for head_rows in rows]
    q, k = rows
    if repeats_k:
        k = k.repeat_interleave(max(1, attention.tp_size // len(k)), dim=0)
    source_rows = {0: q.flatten(), 1: k.flatten()}
    if any(not torch.equal(order, torch.arange(len(order))) for order in source_rows.values()):
        set_notes(projection, source_rows=source_rows)
