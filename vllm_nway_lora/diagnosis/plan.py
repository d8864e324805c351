# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora plan``: a model's fused projections, and how adapters on them are served."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from vllm_nway_lora.diagnosis.report import Outcome, Report, Row, Verdict, build_report
from vllm_nway_lora.diagnosis.sides import each_rank, is_by_table, judge_stock_layer
from vllm_nway_lora.models import tables
from vllm_nway_lora.rows.plan import FusionPlan


def plan_model(
    model: str,
    *,
    tensor_parallel_size: int = 1,
    fully_sharded: bool = False,
    model_impl: str = "auto",
) -> Report:
    """Return the fused projections of ``model``, and the verdicts on adapters on them.

    A row's verdicts are the worst over an adapter on all of its modules and one on each module
    alone. Arguments are those of :func:`vllm_nway_lora.diagnosis.check.check_adapter`.
    """
    rows: dict[str, Row] = {}
    verdicts = {True: Verdict(), False: Verdict()}
    for plugin, rank in each_rank(
        model, tensor_parallel_size, verdicts, fully_sharded=fully_sharded, model_impl=model_impl
    ):
        if plugin:
            _add_rows(rank.lora_manager, rows)
        else:
            _judge_stock(rank.lora_manager, rank.group.rank, rows)
    return build_report(rows, verdicts)


def _add_rows(manager: Any, rows: dict[str, Row]) -> None:
    """Add this rank's fused projections, as they are with the plugin."""
    for name, layer in manager.modules.items():
        plan: FusionPlan | None = getattr(layer, "plan", None)
        own_name = name.rpartition(".")[2]
        packed = manager.packed_modules_mapping.get(own_name, [])
        if plan is None and not packed:
            continue
        modules: dict[str, int | None] = dict.fromkeys(packed or [own_name])
        if plan is not None:
            rows_of = {part.module: part.rows for part in plan.slices}
            modules = {module: rows_of[module] for module in plan.trained}
        row = rows.setdefault(name, Row(name, modules, 0))
        row.by_table = row.by_table or is_by_table(layer)
        if plan is not None:
            row.plan.append(plan)
            for reason in plan.refusals.values():
                row.plugin.worsen(Outcome.REFUSED, reason)


def _judge_stock(manager: Any, rank: int, rows: Mapping[str, Row]) -> None:
    """Worsen each row's verdict on stock vLLM by what this rank does."""
    for name, row in rows.items():
        layer = manager.modules.get(name)
        own_name = name.rpartition(".")[2]
        packed = list(manager.packed_modules_mapping.get(own_name) or [own_name])
        modules = list(row.plan[rank].modules if row.plan else row.modules)
        if packed != modules and (layer is not None or not set(packed) >= set(modules)):
            row.stock.worsen(Outcome.REFUSED, "its class does not list these modules")
            for module in (_accepted_names(manager) & set(modules)) - set(packed):
                row.stock.worsen(Outcome.IGNORED, f"other layers have the name {module} too")
            continue
        if layer is None or _has_unknown_renames(manager.model):
            row.stock.worsen(Outcome.IGNORED, "no LoRA layer uses it, and vLLM reports no error")
            continue
        if not row.plan:
            continue
        refusals = row.plan[rank].refusals
        for reason in refusals.values():
            row.stock.worsen(Outcome.IGNORED, reason)
        if refusals:
            continue
        for adapted in [list(row.modules), *([module] for module in row.modules)]:
            weights_of = [
                (f"{name.rpartition('.')[0]}.{part.module}", _rank_one_weights(layer, part.rows))
                if part.module in adapted
                else (part.module, None)
                for part in row.plan[rank].slices
            ]
            row.stock.worsen(*judge_stock_layer(layer, row.plan[rank], weights_of, []))


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
