# SPDX-License-Identifier: Apache-2.0
"""Mamba2: the weight loader that its mixer sets on the weight of ``in_proj``.

Source: ``mamba_v2_sharded_weight_loader`` in model_executor/layers/mamba/mamba_mixer2.py, 0.17.0 to
0.33.0: a closure that contains the tensor-parallel rank.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm.config import get_current_vllm_config_or_none

from vllm_nway_lora.rows.notes import set_notes
from vllm_nway_lora.rows.plan import PlanError


def save_weight_loader(wrapped: Callable[..., None], mixer: Any, args: Any, kwargs: Any) -> None:
    """Build the mixer, then note the weight loader of its ``in_proj``; wraps its ``__init__``.

    Quantisation and CPU packing drop the parameter that carries the loader. Without LoRA nothing is
    noted. A weight-only quantised ``in_proj`` has no ``weight``, and no loader is noted either.
    """
    wrapped(*args, **kwargs)
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or vllm_config.lora_config is None:
        return
    layer = getattr(mixer, "in_proj", None)
    loader = getattr(getattr(layer, "weight", None), "weight_loader", None)
    # The layer's own method needs no note: it is found again on the class.
    if loader is not None and getattr(loader, "__self__", None) is not layer:
        set_notes(layer, weight_loader=loader)


def loader_for_rank(layer: Any, loader: Callable[..., None], rank: int) -> Callable[..., None]:
    """Return the weight loader of ``rank``, built like ``loader``, that of the layer's own rank.

    Raises:
        PlanError: ``loader`` is not a closure over ``tp_rank`` of a function of its module.
    """
    if rank == layer.tp_rank:
        return loader
    factory = getattr(
        sys.modules.get(loader.__module__), loader.__qualname__.partition(".")[0], None
    )
    arguments = dict(inspect.getclosurevars(loader).nonlocals)
    if factory is None or set(inspect.signature(factory).parameters) != set(arguments):
        raise PlanError(
            f"{layer.prefix}: its weight loader {loader} cannot be built for other ranks"
        )
    if "tp_rank" not in arguments:
        raise PlanError(f"{layer.prefix}: its weight loader {loader} does not depend on a rank")
    made: Callable[..., None] = factory(**{**arguments, "tp_rank": rank})
    return made
