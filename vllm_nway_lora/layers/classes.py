# SPDX-License-Identifier: Apache-2.0
"""The LoRA layer classes of this package, which are asked before vLLM's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm import platforms

from vllm_nway_lora.layers.claims import plan_against_stock
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.models import step5
from vllm_nway_lora.rows.notes import set_notes

_PARAMETERS = ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config")


def build_layer(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    """Return this package's LoRA layer for a layer that it serves, else vLLM's; wraps ``from_layer``.

    vLLM asks the classes of its table ``_all_lora_classes`` in turn. The table is not changed: other
    packages add classes to it and replace it, and until 0.19.1 it is a set, which has no order.
    """
    given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
    layer, model_config = given["layer"], given.get("model_config")
    # tpu-inference shards a LoRA layer by its exact class, one of six of vLLM's.
    is_asked = not platforms.current_platform.is_tpu()
    for layer_class in layer_classes() if is_asked else ():
        if layer_class.can_replace_layer(
            source_layer=layer,
            lora_config=given["lora_config"],
            packed_modules_list=given["packed_modules_list"],
            model_config=model_config,
        ):
            return _create(layer_class, given)
    lora_layer = wrapped(*args, **kwargs)
    if is_asked and (plan := plan_against_stock(layer, given["packed_modules_list"], lora_layer)):
        set_notes(layer, plan=plan)
        return _create(NWayLinearWithLoRA, given)
    return lora_layer


def _create(layer_class: Any, given: Mapping[str, Any]) -> Any:
    lora_layer = layer_class(given["layer"])
    lora_layer.create_lora_weights(
        given["max_loras"], given["lora_config"], given.get("model_config")
    )
    return lora_layer


@functools.cache
def layer_classes() -> tuple[Any, ...]:
    """Return the LoRA layer classes of this package."""
    return (NWayLinearWithLoRA, *step5.layer_classes())
