# SPDX-License-Identifier: Apache-2.0
"""K2-Horizon: its attention reads the weights of its value experts directly.

Source: model_executor/models/k2_horizon.py, 0.33.0.
"""

from __future__ import annotations

from torch import nn

from vllm_nway_lora.rows.notes import set_notes

_ATTENTIONS = ("K2HorizonAttention", "K2HorizonMoVAAttention")


def prepare(model: nn.Module) -> None:
    """Note refusals on the value experts."""
    for attention in model.modules():
        if type(attention).__name__ not in _ATTENTIONS:
            continue
        for number, expert in enumerate(getattr(attention, "v_experts", ())):
            reason = "the model reads its weight directly, together with those of the other value experts"
            set_notes(expert, refusals={str(number): reason})
