# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n: its text model renames the parts of its self-decoder only when it loads weights.

Source: model_executor/models/gemma3n.py, 0.33.0. Older releases rename in ``load_weights``, without a
mapper; there, adapters on these parts are refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.models.utils import WeightsMapper


def prepare(model: nn.Module) -> None:
    """Add the text model's renames to the name mapper of ``model``."""
    for text in model.modules():
        if type(text).__name__ != "Gemma3nTextModel":
            continue
        own: Any = getattr(text, "hf_to_vllm_mapper", None)
        if own is None:
            continue
        # The whole model's mapper knows other prefixes. These names occur once in a path.
        renames = {f".{old}": f".{new}" for old, new in own.orig_to_new_prefix.items()}
        mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
        model.hf_to_vllm_mapper = mapper | WeightsMapper(orig_to_new_substr=renames)
