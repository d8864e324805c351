# SPDX-License-Identifier: Apache-2.0
"""The notes of this package on a base layer: one dataclass on one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_nway_lora.rows.experts import HeldExperts
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.plan import FusionPlan

_ATTRIBUTE = "_nway_lora_notes"


@dataclass(frozen=True)
class LayerNotes:
    """What this package knows of a base layer that the layer's own attributes do not show.

    Attributes:
        plan: the layer's plan. ``can_replace_layer`` sets it for ``__init__``, because vLLM
            constructs a LoRA layer from the base layer alone.
        refusals: module -> the reason why LoRA on it cannot be served.
        modules: the adapter-visible modules of a layer that its model class does not list.
        shards: per output its shard id and its rows in a checkpoint; None if the layer says so itself.
        traced: module -> what the layer's weight holds of it on this rank. A module that the model
            does not have in this layer is left out. None if the layer could not be traced.
        mixture: what the weights of a mixture of experts hold on this rank. None if the layer is no
            mixture or could not be traced.
    """

    plan: FusionPlan | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    shards: Sequence[tuple[int | str, int]] | None = None
    traced: Mapping[str, Held] | None = None
    mixture: HeldExperts | None = None


def get_notes(layer: Any) -> LayerNotes:
    """Return a layer's notes; empty ones if it has none."""
    notes: LayerNotes = getattr(layer, _ATTRIBUTE, LayerNotes())
    return notes


def set_notes(layer: Any, **fields: Any) -> None:
    """Set fields of a layer's notes and leave the others unchanged."""
    setattr(layer, _ATTRIBUTE, dataclasses.replace(get_notes(layer), **fields))


def add_refusals(layer: Any, refusals: Mapping[str, str]) -> None:
    """Add refusals to a layer's notes. A module that has one already keeps its reason."""
    set_notes(layer, refusals={**refusals, **get_notes(layer).refusals})
