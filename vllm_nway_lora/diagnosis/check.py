# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora check``: how one adapter on one model is served, without and with the plugin.

No table predicts the answer. vLLM's own LoRA manager wraps the model's own class on each rank (see
:mod:`vllm_nway_lora.diagnosis.offline`), loads the adapter and fills its slots, once without the
plugin and once with it. LoRA-B then contains the numbers of its rows, which show where each row went.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest

from vllm_nway_lora import settings
from vllm_nway_lora.adapters.admission import decide
from vllm_nway_lora.adapters.fit import validate_layer, weights_for_layer
from vllm_nway_lora.adapters.hooks import any_layout, format_failure, format_label
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.offline import format_error
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import (
    DEFAULT_RANK,
    Outcome,
    Report,
    Row,
    Verdict,
    build_report,
    fold_names,
)
from vllm_nway_lora.diagnosis.sides import (
    each_rank,
    find_bypassed,
    is_by_table,
    judge_stock_experts,
    judge_stock_layer,
)
from vllm_nway_lora.diagnosis.zeros import find_dtype, zero_adapter
from vllm_nway_lora.layers.readers import find_refusals

_LENIENT = f"{settings.VARIABLE}={settings.Mode.LENIENT.value}"


def check_adapter(model: str, adapter: str, options: ServerOptions | None = None) -> Report:
    """Return how ``adapter`` is served on ``model``, without reading a weight of either.

    Args:
        model: a local folder with ``config.json``.
        adapter: a local folder with ``adapter_config.json`` and the tensors, of which only names,
            shapes and dtypes are read.
        options: the server's options.

    Raises:
        UsageError: the model's configuration, an option or a file cannot be read.
        AdapterError: the files of the adapter's tensors are incomplete, or of a type that is not read.
    """
    options = options or ServerOptions()
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    rank = options.max_lora_rank or _round_rank(_read_ranks(config))
    check = _Check(model, Path(adapter), dataclasses.replace(options, max_lora_rank=rank))
    report = check.run()
    if not options.max_lora_rank and check.rank > rank and _round_rank([check.rank]) > rank:
        # A translation can need a higher rank than the file has.
        rank = _round_rank([check.rank])
        return _Check(model, Path(adapter), dataclasses.replace(options, max_lora_rank=rank)).run()
    return report


class _Check:
    """One adapter on one model with one set of options.

    Attributes:
        rank: the highest rank of the adapter's modules, after its translation.
    """

    def __init__(self, model: str, adapter: Path, options: ServerOptions) -> None:
        self._model, self._adapter, self._options = model, adapter, options
        self._rows: dict[str, Row] = {}
        self._verdicts = {True: Verdict(), False: Verdict()}
        self._rules: dict[str, None] = {}
        self._left_out: dict[str, dict[str, None]] = {}
        self._dtype = torch.float32  # of the adapter's tensors
        self.rank = 0

    def run(self) -> Report:
        """Load the adapter on every rank of both sides; return the report."""
        with zero_adapter(self._adapter) as zeros:
            self._dtype = find_dtype(zeros)
            for plugin, rank in each_rank(self._model, self._options, self._verdicts):
                load = self._load_with_plugin if plugin else self._load_stock
                loaded = load(rank, zeros)
                if loaded is None:
                    continue
                ranks = [weights.rank for weights in loaded.loras.values()]
                self.rank = max([self.rank, *ranks])
                if plugin:
                    self._add_rows(rank, loaded)
                else:
                    self._judge_stock(rank, loaded)
        report = build_report(self._rows, self._verdicts)
        report.rules = list(self._rules)
        report.max_lora_rank = self._options.max_lora_rank or DEFAULT_RANK
        report.left_out = {reason: fold_names(of) for reason, of in self._left_out.items()}
        return report

    def _load_stock(self, rank: offline.Rank, folder: Path) -> Any:
        """Return the ``LoRAModel`` that stock loads; None if it is refused."""
        try:
            return _load(rank, folder, self._dtype)
        except Exception as error:
            text = self._name(format_error(error), folder)
            self._verdicts[False].worsen(Outcome.REFUSED, text)
            return None

    def _load_with_plugin(self, rank: offline.Rank, folder: Path) -> Any:
        """Return the ``LoRAModel`` that a server with the plugin loads; None if it has no layers.

        A refusal worsens the verdict, with the message that the server would give.
        """
        label = format_label(self._adapter.name, str(self._adapter))
        try:
            with any_layout(rank.lora_manager):
                adapter = _load(rank, folder, self._dtype)
        except Exception as error:
            text = self._name(format_failure(label, error), folder)
            self._verdicts[True].worsen(Outcome.REFUSED, text)
            return None
        findings, refusal = decide(rank.lora_manager, adapter, label)
        if refusal:
            self._verdicts[True].worsen(Outcome.REFUSED, refusal)
        else:
            left_out = {**findings.left_out}
            if findings.unmatched:
                left_out[f"no layer of this model uses them, and {_LENIENT}"] = [
                    name for name in findings.unused if not _is_in(name, findings.left_out)
                ]
            for reason, modules in left_out.items():
                self._left_out.setdefault(reason, {}).update(dict.fromkeys(modules))
        self._rules |= dict.fromkeys(get_origin(adapter).rules)
        return adapter

    def _name(self, text: str, folder: Path) -> str:
        """Return ``text`` with the user's folder in place of the temporary one."""
        return text.replace(str(folder), str(self._adapter))

    def _add_rows(self, rank: offline.Rank, adapter: Any) -> None:
        """Add the rows of one rank with the plugin, or worsen the verdicts of those that are there."""
        manager = rank.lora_manager
        used: set[int] = set()
        for name, layer, weights_of in _adapted_layers(manager, adapter):
            used |= {id(weights) for _, weights in weights_of if weights}
            row = self._rows.setdefault(name, _row(name, weights_of))
            row.by_table = row.by_table or is_by_table(layer)
            row.unservable = row.unservable or _find_refusal(layer, weights_of)
            for fault in validate_layer(manager, name, layer, weights_of)[:1]:
                row.plugin.worsen(Outcome.REFUSED, fault)
            if hasattr(layer, "plan"):
                row.plan.append(layer.plan)
            row.is_fused = len(weights_of) > 1 or bool(row.plan)
        for name, weights in adapter.loras.items():
            if id(weights) not in used and not _is_in(name, self._left_out):
                row = self._rows.setdefault(name, _row(name, [(name, weights)]))
                row.plugin.worsen(Outcome.REFUSED, "no layer of this model uses it")

    def _judge_stock(self, rank: offline.Rank, adapter: Any) -> None:
        """Worsen the rows' verdicts on stock by what this rank does."""
        manager = rank.lora_manager
        bypassed = find_bypassed(rank)
        used: set[int] = set()
        adapted: set[str] = set()
        for name, layer, weights_of in _adapted_layers(manager, adapter):
            adapted.add(name)
            used |= {id(weights) for _, weights in weights_of if weights}
            row = self._rows.setdefault(name, _row(name, weights_of))
            faults = validate_layer(manager, name, layer, weights_of)
            if isinstance(layer, FusedMoEWithLoRA):
                row.stock.worsen(*judge_stock_experts(manager, name, adapter, faults))
                continue
            plan = row.plan[rank.group.rank] if row.plan else None
            row.stock.worsen(*judge_stock_layer(layer, plan, weights_of, faults))
            if row.unservable:
                row.stock.worsen(Outcome.WRONG, row.unservable)
            if past := bypassed.get(id(getattr(layer, "base_layer", None))):
                row.stock.worsen(*past)
        for name, weights in adapter.loras.items():
            if id(weights) not in used and not _is_in(name, self._left_out):
                self._verdicts[False].worsen(
                    Outcome.IGNORED, f"no LoRA layer uses {name}, and vLLM reports no error"
                )
        for name in self._rows.keys() - adapted:
            reason = "vLLM has no LoRA layer there, and reports no error"
            if name in manager.modules:
                reason = "vLLM finds no module of it in the adapter"
            self._rows[name].stock.worsen(Outcome.IGNORED, reason)


def _load(rank: offline.Rank, folder: Path, dtype: torch.dtype) -> Any:
    manager = rank.worker_manager
    # Without a conversion, the zeros stay in the sparse file: an adapter on experts can be gigabytes.
    with mock.patch.object(manager.lora_config, "lora_dtype", dtype):
        # The class's method is vLLM's own. Admission, which guards instances, follows.
        adapter = type(manager)._load_adapter(manager, LoRARequest("adapter", 1, str(folder)))
    for number, weights in enumerate(adapter.loras.values()):
        # The zeros stand for values that were not read. A module that really is zero is no loss.
        for half in (weights.lora_a, weights.lora_b):
            if half is not None and half.numel():
                half[(0,) * half.ndim] = number % 251 + 1  # exact in bfloat16
    return adapter


def _adapted_layers(manager: Any, adapter: Any) -> list[tuple[str, Any, list[tuple[str, Any]]]]:
    """Return path, LoRA layer and weights of each layer for which an adapter has a module."""
    layers = [
        (name, layer, weights_for_layer(manager, adapter, name, layer))
        for name, layer in manager.modules.items()
    ]
    return [found for found in layers if any(weights for _, weights in found[2])]


def _is_in(module: str, left_out: Mapping[str, Collection[str]]) -> bool:
    return any(module in modules for modules in left_out.values())


def _find_refusal(layer: Any, weights_of: list[tuple[str, Any]]) -> str:
    refusals = find_refusals(layer)
    adapted = [module.rpartition(".")[2] for module, weights in weights_of if weights is not None]
    return next((refusals[module] for module in adapted if module in refusals), "")


def _row(name: str, weights_of: list[tuple[str, Any]]) -> Row:
    modules = {
        module.rpartition(".")[2]: None if w is None or w.lora_b is None else int(w.lora_b.shape[0])
        for module, w in weights_of
    }
    ranks = [w.lora_a.shape[0] for _, w in weights_of if w is not None and w.lora_a is not None]
    return Row(name, modules, max(ranks, default=0))


def _read_ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks that a configuration names, PEFT's or MLX-LM's."""
    mlx = config.get("lora_parameters") or {}
    return [config.get("r") or mlx.get("rank") or 8, *(config.get("rank_pattern") or {}).values()]


def _round_rank(ranks: Sequence[int]) -> int:
    """Return the smallest value of ``--max-lora-rank`` that is enough for ``ranks``."""
    return next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= max(ranks)), max(ranks))
