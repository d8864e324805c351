# SPDX-License-Identifier: Apache-2.0
"""K2-Horizon: rows that its ``load_weights`` moves before any layer's weight loader sees them.

Source: model_executor/models/k2_horizon.py, 0.33.0. It permutes the rows of q and k within each head,
so that a partial rotary embedding finds its channels in one piece, and repeats k's heads where there
are fewer of them than ranks. A layer's loader knows of neither.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from vllm_nway_lora.claims import REFUSALS_ATTRIBUTE
from vllm_nway_lora.probe import HANDED_ROWS_ATTRIBUTE

_ATTENTIONS = ("K2HorizonAttention", "K2HorizonMoVAAttention")


def prepare(model: nn.Module) -> None:
    """Note on the fused projections which rows their loaders are handed; mark what is never called."""
    for attention in model.modules():
        if type(attention).__name__ not in _ATTENTIONS:
            continue
        for name in ("qk_proj", "qkv_proj"):
            if hasattr(attention, name):
                _note(attention, getattr(attention, name), repeats_k=name == "qk_proj")
        for number, expert in enumerate(getattr(attention, "v_experts", ())):
            reason = "its weight is read past any LoRA layer, with those of the other value experts"
            setattr(expert, REFUSALS_ATTRIBUTE, {str(number): reason})


def _note(attention: Any, projection: Any, *, repeats_k: bool) -> None:
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
    handed = {0: q.flatten(), 1: k.flatten()}
    if any(not torch.equal(rows, torch.arange(len(rows))) for rows in handed.values()):
        setattr(projection, HANDED_ROWS_ATTRIBUTE, handed)
