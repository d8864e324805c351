# SPDX-License-Identifier: Apache-2.0
"""Mamba2: the number of rows of ``in_proj`` in a checkpoint.

Its layer counts a group once per tensor-parallel rank, and its mixer sets a loader of its own on the
weight. Source: ``mamba_v2_sharded_weight_loader`` in model_executor/layers/mamba/mamba_mixer2.py,
0.17.0 to 0.33.0: a closure that contains the tensor-parallel rank.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.probe import read_whole


def checkpoint_rows(layer: Any) -> int:
    """Return the rows over all ranks of a single module, also where its weight has its own loader.

    Args:
        layer: a ``LinearBase`` with its unquantised ``weight``.
    """
    loader = getattr(layer.weight, "weight_loader", None)
    size: int = layer.output_size
    if (
        loader is None
        or getattr(loader, "__self__", None) is layer
        or not hasattr(layer, "tp_rank")
    ):
        return size
    try:
        return read_whole(layer, functools.partial(_loader_for_rank, layer, loader)).rows
    except PlanError:
        return size


def _loader_for_rank(layer: Any, loader: Callable[..., None], rank: int) -> Callable[..., None]:
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
