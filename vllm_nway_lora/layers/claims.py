# SPDX-License-Identifier: Apache-2.0
"""The choice of the layers that this package serves, and the plan of each."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import vllm
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.lora.layers import FusedMoEWithLoRA, MergedColumnParallelLinearWithLoRA
from vllm.model_executor import custom_op
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
)

from vllm_nway_lora import settings
from vllm_nway_lora.compat import defects
from vllm_nway_lora.layers import traced_experts
from vllm_nway_lora.layers.traced import find_difference, plan_traced
from vllm_nway_lora.models import tables
from vllm_nway_lora.models.traced_experts import refuse
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import LayerNotes, get_notes, set_notes
from vllm_nway_lora.rows.plan import FusionPlan, Output, build_plan, refuse_all
from vllm_nway_lora.rows.probe import LoaderError, list_shards, read_outputs

logger = logging.getLogger("vllm.nway_lora")

#: The classes of layers of which a warning has been logged.
_left_to_vllm: set[type] = set()


def plan_for(layer: Any, packed_modules: Sequence[str]) -> FusionPlan | None:
    """Return the plan of a layer that vLLM's own LoRA classes serve wrongly or at a cost, or None.

    Args:
        layer: the base layer, its weights loaded.
        packed_modules: its adapter-visible modules (``packed_modules_mapping``). None or one if
            adapters see the projection itself.

    Raises:
        PlanError: ``VLLM_NWAY_LORA=strict``, and the layer's weight loader places its rows in a way
            that no plan describes. In the other modes the plan refuses every adapter on that layer.
    """
    if not isinstance(layer, ColumnParallelLinear):
        return None
    if _has_own_forward(layer):
        if isinstance(layer, MergedColumnParallelLinear):
            _warn_of_own_forward(layer, packed_modules)
        return None
    modules = list(packed_modules) or [_name(layer)]
    notes = get_notes(layer)
    if notes.refusals.keys() >= set(modules):
        plan = refuse_all(_name(layer), modules, layer.output_size_per_partition, "")
        return dataclasses.replace(plan, refusals=notes.refusals)
    try:
        if isinstance(layer, MergedColumnParallelLinear) or (notes.shards and notes.traced):
            return _plan_merged(layer, packed_modules, notes)
    except PlanError as error:
        return _refuse(layer, modules, error)
    return None


def plan_against_stock(
    layer: Any, packed_modules: Sequence[str], lora_layer: Any
) -> FusionPlan | None:
    """Return the plan of a layer whose trace differs from the slots of vLLM's LoRA layer, or None.

    If no plan describes the trace, or another class of layers cannot have one, every adapter on the
    layer is refused: by the plan, or by a note.

    Args:
        layer: the base layer, its weights loaded.
        packed_modules: as for :func:`plan_for`.
        lora_layer: vLLM's LoRA layer on it.

    Raises:
        PlanError: as for :func:`plan_for`.
    """
    if isinstance(lora_layer, FusedMoEWithLoRA):
        _compare_experts(layer, lora_layer)
        return None
    held = get_notes(layer).traced
    if held is None or not isinstance(layer, LinearBase):
        return None
    modules = list(packed_modules) or [_name(layer)]
    try:
        difference = find_difference(lora_layer, modules, held)
    except Exception as error:  # a class of another package, with other methods
        logger.debug("The slots of %s were not compared: %s", layer.prefix, error)
        return None
    if not difference:
        return None
    if not isinstance(layer, ColumnParallelLinear) or _has_own_forward(layer):
        reason = f"vllm-nway-lora cannot serve LoRA on {layer.prefix}: {difference}"
        set_notes(layer, refusals=dict.fromkeys(modules, reason))
        return None
    try:
        return plan_traced(layer, _name(layer), modules, held)
    except Exception as error:  # a loader of another package, when it is asked for the outputs
        return _refuse(layer, modules, PlanError(str(error)))


def _compare_experts(layer: Any, lora_layer: Any) -> None:
    """Refuse every adapter on a mixture of experts whose trace differs from vLLM's slots."""
    mixture = get_notes(layer).mixture
    if mixture is None:
        return
    try:
        difference = traced_experts.find_difference(lora_layer, mixture)
    except Exception as error:  # a kernel pads its weights, or a class of another package
        _log_once(
            logging.INFO, f"By table: mixtures of experts. Their slots are not compared: {error}"
        )
        return
    if difference:
        reason = (
            f"vllm-nway-lora cannot serve LoRA on the experts of this model: {difference}. Train the "
            "adapter without its experts"
        )
        refuse(layer, mixture.kinds, reason)
        _log_once(logging.WARNING, f"{reason}. Adapters on them will be refused.")


@functools.cache
def _log_once(level: int, text: str) -> None:
    logger.log(level, text)


def _refuse(layer: Any, modules: Sequence[str], error: PlanError) -> FusionPlan:
    if settings.read_mode() is settings.Mode.STRICT:
        raise error
    reason = f"vllm-nway-lora cannot serve LoRA on {layer.prefix}: {error}"
    logger.warning("%s. Adapters on it will be refused.", reason)
    return refuse_all(_name(layer), modules, layer.output_size_per_partition, reason)


def _plan_merged(layer: Any, packed_modules: Sequence[str], notes: LayerNotes) -> FusionPlan | None:
    sizes = [rows for _, rows in list_shards(layer)]
    if len(sizes) < 3 and not packed_modules:
        return None  # not a LoRA target under any name: vLLM has no class for it either
    modules = list(packed_modules) or [_name(layer)]
    outputs: list[Output] | None = None
    is_pair = len(sizes) == 2 and (
        len(modules) == 2 or (len(modules) == 1 and sizes[0] == sizes[1])
    )
    stock_serves = is_pair and (len(modules) == 1 or _stock_takes_pairs(layer, modules))
    if stock_serves and not notes.refusals:
        if notes.traced is not None:
            return None  # `plan_against_stock` compares vLLM's slots with the trace
        # vLLM's own classes are exact here, unless the layer's own loader replicates an output.
        if type(layer).weight_loader is MergedColumnParallelLinear.weight_loader:
            return None
        try:
            outputs = read_outputs(layer)
        except LoaderError:
            return None
        if all(output.rows == size for output, size in zip(outputs, sizes, strict=True)):
            return None
    if notes.traced is not None:
        plan = plan_traced(layer, _name(layer), modules, notes.traced)
        return dataclasses.replace(plan, refusals=notes.refusals)
    groups = tables.outputs_by_module(_name(layer), modules, len(sizes))
    if groups is None:
        raise PlanError(
            f"{_name(layer)} has {len(sizes)} outputs and {len(modules)} modules "
            f"({', '.join(modules)}), and which outputs each module covers is not known"
        )
    plan = build_plan(_name(layer), modules, groups, outputs or read_outputs(layer))
    return dataclasses.replace(plan, refusals=notes.refusals)


def _stock_takes_pairs(layer: Any, modules: Sequence[str]) -> bool:
    """Return whether vLLM has a LoRA class that serves ``layer`` with its pair of outputs.

    Until 0.19.1 vLLM has none for subclasses: the engine does not start, or ignores the adapter. In
    some releases it gathers over all ranks what every rank has, which costs time and fails on CPU.
    """
    ranks = get_tensor_model_parallel_world_size()
    gathers = "whole-layer-gathered" if layer.tp_size < ranks else "gathered-when-whole"
    if ranks > 1 and defects.find(gathers).affects(vllm.__version__):
        return False
    return bool(
        MergedColumnParallelLinearWithLoRA.can_replace_layer(
            source_layer=layer,
            lora_config=None,
            packed_modules_list=list(modules),
            model_config=None,
            decorate=False,  # in either mode: its sharded class calls this method too
        )
    )


def _has_own_forward(layer: Any) -> bool:
    """Return whether the layer's class computes something else than a column-parallel product."""
    if type(layer).__name__ in tables.SAME_PRODUCT:
        return False
    # A platform can replace vLLM's class by its own, which computes the same product. vLLM's function
    # that looks it up is missing in 0.17, and had another name in 0.18.
    replacements = custom_op.op_registry_oot
    plain = (ColumnParallelLinear, MergedColumnParallelLinear)
    return type(layer).forward not in [
        layer_class.forward
        for known in plain
        for layer_class in (known, replacements.get(known.__name__, known))
    ]


def _warn_of_own_forward(layer: Any, packed_modules: Sequence[str]) -> None:
    """Log that a layer which vLLM may serve in part is left to vLLM, once per class of layers."""
    layer_class = type(layer)
    outputs = len(list_shards(layer))
    is_pair = outputs < 3 and len(packed_modules) in (0, outputs)
    if is_pair or layer_class in _left_to_vllm:
        return
    _left_to_vllm.add(layer_class)
    logger.warning(
        "vllm-nway-lora leaves LoRA on %s to vLLM: its class %s.%s has a forward of its own. vLLM may "
        "refuse or ignore an adapter on some of its modules.",
        layer.prefix,
        layer_class.__module__,
        layer_class.__qualname__,
    )


def _name(layer: Any) -> str:
    return str(layer.prefix.rpartition(".")[2])
