# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's layers this package takes, and the plan that it serves each by."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import vllm
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
from vllm.model_executor import custom_op
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from vllm_nway_lora import fusions, releases, settings
from vllm_nway_lora.plan import FusionPlan, Output, PlanError, build_plan, refuse_all
from vllm_nway_lora.probe import (
    HANDED_ROWS_ATTRIBUTE,
    parameter_loader,
    read_outputs,
    read_whole,
    shards,
)

logger = logging.getLogger("vllm.nway_lora")

#: On a base layer: module -> why LoRA on it cannot be served, as :mod:`vllm_nway_lora.mappings` found.
REFUSALS_ATTRIBUTE = "_nway_lora_refusals"


def plan_for(layer: Any, packed_modules: Sequence[str]) -> FusionPlan | None:
    """Return the plan of a layer that vLLM's own LoRA classes serve wrongly or at a loss, or None.

    Args:
        layer: the base layer, its weights loaded.
        packed_modules: its adapter-visible modules (``packed_modules_mapping``); none or one where
            adapters see the projection itself.

    Raises:
        PlanError: ``VLLM_NWAY_LORA=strict`` and no plan can hold the way in which the layer's
            weight loader places its rows. Otherwise every adapter on that layer is refused.
    """
    if not isinstance(layer, ColumnParallelLinear) or _has_own_forward(layer):
        return None
    modules = list(packed_modules) or [_name(layer)]
    refusals = getattr(layer, REFUSALS_ATTRIBUTE, {})
    if refusals.keys() >= set(modules):
        plan = refuse_all(_name(layer), modules, layer.output_size_per_partition, "")
        return dataclasses.replace(plan, refusals=refusals)
    try:
        if isinstance(layer, MergedColumnParallelLinear) or hasattr(layer, HANDED_ROWS_ATTRIBUTE):
            return _plan_merged(layer, packed_modules, refusals)
        if len(modules) == 1 and not isinstance(layer, QKVParallelLinear):
            return _plan_single(layer, modules)
    except PlanError as error:
        if settings.read_mode() is settings.Mode.STRICT:
            raise
        reason = f"vllm-nway-lora cannot serve LoRA on {layer.prefix}: {error}"
        logger.warning("%s. Adapters on it will be refused.", reason)
        return refuse_all(_name(layer), modules, layer.output_size_per_partition, reason)
    return None


def _plan_merged(
    layer: Any, packed_modules: Sequence[str], refusals: Mapping[str, str]
) -> FusionPlan | None:
    sizes = [rows for _, rows in shards(layer)]
    if len(sizes) < 3 and not packed_modules:
        return None  # not a LoRA target under any name: vLLM has no class for it either
    modules = list(packed_modules) or [_name(layer)]
    outputs: list[Output] | None = None
    halves = len(sizes) == 2 and (len(modules) == 2 or (len(modules) == 1 and sizes[0] == sizes[1]))
    made_for = halves and (len(modules) == 1 or _stock_takes_pairs(layer, modules))
    if made_for and not refusals and not hasattr(layer, HANDED_ROWS_ATTRIBUTE):
        # What vLLM's own classes are made for, unless the layer's own loader replicates a part.
        if type(layer).weight_loader is MergedColumnParallelLinear.weight_loader:
            return None
        outputs = read_outputs(layer)
        if all(output.rows == size for output, size in zip(outputs, sizes, strict=True)):
            return None
    plan = build_plan(
        _name(layer),
        modules,
        fusions.outputs_by_module(_name(layer), modules, len(sizes)),
        outputs or read_outputs(layer),
    )
    return dataclasses.replace(plan, refusals=refusals)


def _plan_single(layer: Any, modules: Sequence[str]) -> FusionPlan | None:
    """Plan a layer that is no merged one, but whose weight a loader of its own lays out."""
    loader = parameter_loader(layer)
    if loader is None:
        return None
    return build_plan(_name(layer), modules, [[0]], [read_whole(layer, loader)])


def _stock_takes_pairs(layer: Any, modules: Sequence[str]) -> bool:
    """Tell whether vLLM has a LoRA class for a pair of outputs on ``layer`` that serves it.

    To 0.19.1 it has none for subclasses: the engine does not start, or ignores the adapter. In
    some releases it gathers over all ranks what no rank lacks, which costs time and fails on CPU.
    """
    ranks = get_tensor_model_parallel_world_size()
    gathers = "whole-layer-gathered" if layer.tp_size < ranks else "gathered-when-whole"
    if ranks > 1 and releases.defect(gathers).messages(vllm.__version__) is not None:
        return False
    return bool(
        MergedColumnParallelLinearWithLoRA.can_replace_layer(
            source_layer=layer,
            lora_config=None,
            packed_modules_list=list(modules),
            model_config=None,
            decorate=False,  # whatever the mode: its sharded class asks this one
        )
    )


def _has_own_forward(layer: Any) -> bool:
    """Tell a layer whose class computes something else than a column-parallel product."""
    if type(layer).__name__ in fusions.SAME_PRODUCT:
        return False
    # A platform's replacement for vLLM's class may be there (0.19.0 on); it computes the same.
    replacement = getattr(custom_op, "maybe_get_oot_by_class", lambda layer_class: layer_class)
    plain = (ColumnParallelLinear, MergedColumnParallelLinear)
    return type(layer).forward not in [
        layer_class.forward for known in plain for layer_class in (known, replacement(known))
    ]


def _name(layer: Any) -> str:
    return str(layer.prefix.rpartition(".")[2])
