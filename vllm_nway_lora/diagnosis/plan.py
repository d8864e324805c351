# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora plan``: on what a model takes LoRA, how adapters on it are served, and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase

from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import (
    DEFAULT_RANK,
    Cost,
    Outcome,
    Report,
    Row,
    Verdict,
    build_report,
    fold_names,
)
from vllm_nway_lora.diagnosis.sides import each_rank, find_bypassed, is_by_table, judge_stock_layer
from vllm_nway_lora.layers.readers import find_refusals
from vllm_nway_lora.models import tables
from vllm_nway_lora.rows.plan import FusionPlan


def plan_model(model: str, options: ServerOptions | None = None) -> Report:
    """Return the layers of ``model`` that take LoRA, and the verdicts on adapters on them.

    A row's verdicts are the worst over an adapter on all of its modules and one on each module
    alone. ``model`` and ``options`` are those of :func:`vllm_nway_lora.diagnosis.check.check_adapter`.

    Raises:
        UsageError: the model's configuration or an option cannot be read.
    """
    options = options or ServerOptions()
    rows: dict[str, Row] = {}
    verdicts = {True: Verdict(), False: Verdict()}
    costs: dict[str, Cost] = {}
    for plugin, rank in each_rank(model, options, verdicts):
        if plugin:
            _add_rows(rank.lora_manager, rows)
        else:
            _judge_stock(rank, rows)
        costs.setdefault("plugin" if plugin else "stock", measure_cost(rank.lora_manager))
    report = build_report(rows, verdicts)
    report.costs = costs
    report.max_lora_rank = options.max_lora_rank or DEFAULT_RANK
    return report


def _add_rows(manager: Any, rows: dict[str, Row]) -> None:
    """Add this rank's layers, as they are with the plugin."""
    for name, layer in manager.modules.items():
        plan: FusionPlan | None = getattr(layer, "plan", None)
        own_name = name.rpartition(".")[2]
        packed = manager.packed_modules_mapping.get(own_name, [])
        modules: dict[str, int | None] = dict.fromkeys(fold_names(packed or [own_name]))
        if plan is not None:
            rows_of = {part.module: part.rows for part in plan.slices}
            modules = {module: rows_of[module] for module in plan.trained}
        row = rows.setdefault(name, Row(name, modules, 0))
        row.is_fused = plan is not None or len(packed) > 1
        row.is_adaptable = not _is_convolution(layer)
        row.by_table = row.by_table or is_by_table(layer)
        if plan is not None:
            row.plan.append(plan)
        refusals = {**find_refusals(layer), **(plan.refusals if plan is not None else {})}
        for reason in refusals.values():
            row.unservable = reason
            row.plugin.worsen(Outcome.REFUSED, reason)


def _is_convolution(layer: Any) -> bool:
    """Return whether a LoRA layer's base is a convolution, which vLLM builds as a linear layer."""
    base = getattr(layer, "base_layer", None)
    weight = getattr(base, "weight", None)
    return isinstance(base, LinearBase) and weight is not None and weight.ndim == 3


def _judge_stock(rank: offline.Rank, rows: Mapping[str, Row]) -> None:
    """Worsen each row's verdict on stock vLLM by what this rank does."""
    manager = rank.lora_manager
    bypassed = find_bypassed(rank)
    for name, row in rows.items():
        layer = manager.modules.get(name)
        if past := bypassed.get(id(getattr(layer, "base_layer", None))):
            row.stock.worsen(*past)
        own_name = name.rpartition(".")[2]
        packed = list(manager.packed_modules_mapping.get(own_name) or [own_name])
        plan = row.plan[rank.group.rank] if row.plan else None
        modules = list(plan.modules if plan else row.modules)
        if plan is None:
            packed = fold_names(packed)
        if packed != modules and (layer is not None or not set(packed) >= set(modules)):
            row.stock.worsen(Outcome.REFUSED, "its class does not list these modules")
            for module in (_accepted_names(manager) & set(modules)) - set(packed):
                row.stock.worsen(Outcome.IGNORED, f"other layers have the name {module} too")
            continue
        if layer is None or _has_unknown_renames(manager.model):
            row.stock.worsen(Outcome.IGNORED, "no LoRA layer uses it, and vLLM reports no error")
            continue
        if row.unservable:
            row.stock.worsen(Outcome.IGNORED, row.unservable)
        elif plan is not None:
            _judge_subsets(layer, name, row, plan)


def _judge_subsets(layer: Any, name: str, row: Row, plan: FusionPlan) -> None:
    """Worsen a row's verdict on stock by adapters on all of its modules and on each alone."""
    for adapted in [list(row.modules), *([module] for module in row.modules)]:
        weights_of = [
            (f"{name.rpartition('.')[0]}.{part.module}", _rank_one_weights(layer, part.rows))
            if part.module in adapted
            else (part.module, None)
            for part in plan.slices
        ]
        row.stock.worsen(*judge_stock_layer(layer, plan, weights_of, []))


def measure_cost(manager: Any) -> Cost:
    """Return the cost of an adapter on every module of one rank.

    Args:
        manager: the ``LoRAModelManager`` of a wrapped model.
    """
    cost = Cost()
    per_rank = manager.lora_slots * manager.lora_config.max_lora_rank
    for layer in {id(layer): layer for layer in manager.modules.values()}.values():
        slots = {
            tensor.untyped_storage()._cdata: tensor
            for name, value in vars(layer).items()
            if name.endswith("_stacked")
            for tensor in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(tensor, torch.Tensor)
        }
        numbers = sum(t.untyped_storage().nbytes() // t.itemsize for t in slots.values())
        cost.bytes_per_lora_rank += 2 * numbers // per_rank
        if isinstance(layer, BaseLinearLayerWithLoRA):
            cost.slices += len(layer.lora_a_stacked)
    return cost


def _accepted_names(manager: Any) -> set[str]:
    """Return the module names that vLLM accepts anywhere in the model.

    As ``_load_adapter`` in vllm/lora/worker_manager.py builds them, 0.17.0 to 0.33.0.
    """
    names: set[str] = set()
    for name in manager.supported_lora_modules:
        names.update(manager.packed_modules_mapping.get(name) or [name])
    return names


def _has_unknown_renames(model: Any) -> bool:
    """Return whether vLLM looks for the modules of ``model`` by names that its checkpoints lack."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = tables.RENAMES.get(type(model).__name__, {})
    return any(old not in getattr(mapper, "orig_to_new_substr", {}) for old in renames)


def _rank_one_weights(layer: Any, rows: int) -> Any:
    """Return zeros for a module, with LoRA rank 1."""
    return SimpleNamespace(lora_a=torch.zeros(1, layer.input_size), lora_b=torch.zeros(rows, 1))
