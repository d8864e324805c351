# SPDX-License-Identifier: Apache-2.0
"""``--kv-sharing-fast-prefill``: a model passes only some tokens of a prefill to its last layers.

vLLM tells its LoRA layers the adapter of every token of the batch. These layers get fewer tokens at other
indices, so a token would get the adapter of another one.
Source: ``fast_prefill_forward`` in model_executor/models/gemma4.py and gemma3n.py, 0.17.1 to 0.33.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from vllm_nway_lora.models import traced_experts
from vllm_nway_lora.rows.notes import get_notes, set_notes

_REASON = "with --kv-sharing-fast-prefill the layer gets only some tokens of a prefill"


def refuse_cross_decoders(model: nn.Module, mapping: Mapping[str, Sequence[str]]) -> None:
    """Note refusals on the layers that do not get every token of a batch.

    Args:
        model: the built model, not wrapped for LoRA yet.
        mapping: fused projection's name -> its adapter-visible modules.
    """
    for part in model.modules():
        decoder = getattr(part, "cross_decoder", None)
        if not getattr(part, "fast_prefill_enabled", False) or not isinstance(decoder, nn.Module):
            continue
        for path, layer in decoder.named_modules():
            name = path.rpartition(".")[2]
            modules = mapping.get(name) or [name]
            if isinstance(layer, LinearBase):
                refusals = dict.fromkeys(modules, _REASON)
                set_notes(layer, refusals={**refusals, **get_notes(layer).refusals})
            elif get_notes(layer).mixture is not None:
                traced_experts.refuse(layer, [m.rpartition(".")[2] for m in modules], _REASON)
