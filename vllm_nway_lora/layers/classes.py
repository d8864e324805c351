# SPDX-License-Identifier: Apache-2.0
"""The table of LoRA layer classes, with this package's classes first."""

from __future__ import annotations

from typing import Any

from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.models import step5


def put_our_classes_first(lora_classes: Any) -> tuple[type, ...]:
    """Return the table that replaces vLLM's ``_all_lora_classes``.

    vLLM's ``from_layer`` uses the first class that claims a layer, so ours come first. Until 0.19.1
    vLLM keeps the classes in a set, which has no order.
    """
    return (NWayLinearWithLoRA, *step5.layer_classes(), *lora_classes)
