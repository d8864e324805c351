# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora check``: how one adapter on one model is served, without and with the plugin.

No table predicts the answer. vLLM's own LoRA manager wraps the model's own class on each rank (see
:mod:`vllm_nway_lora.diagnosis.offline`), loads the adapter and fills its slots, once without the
plugin and once with it. LoRA-B then contains the numbers of its rows, which show where each row went.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_nway_lora.adapters.admission import examine
from vllm_nway_lora.adapters.fit import validate_layer, weights_for_layer
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.report import Outcome, Report, Row, Verdict, build_report
from vllm_nway_lora.diagnosis.sides import (
    each_rank,
    format_error,
    is_by_table,
    judge_stock_layer,
)
from vllm_nway_lora.layers.readers import find_readers, find_refusals


def check_adapter(
    model: str,
    adapter: str,
    *,
    tensor_parallel_size: int = 1,
    fully_sharded: bool = False,
    max_lora_rank: int | None = None,
    model_impl: str = "auto",
) -> Report:
    """Return how ``adapter`` is served on ``model``, without reading a weight of either.

    Args:
        model: a local folder with ``config.json``.
        adapter: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``, of
            which only the header is read.
        tensor_parallel_size: ``--tensor-parallel-size``.
        fully_sharded: ``--fully-sharded-loras``.
        max_lora_rank: ``--max-lora-rank``; by default the smallest value of vLLM's that is enough.
        model_impl: ``--model-impl``.

    Raises:
        FileNotFoundError: the adapter's folder lacks a file.
    """
    rank = max_lora_rank or _round_rank(
        json.loads(Path(adapter, "adapter_config.json").read_text())
    )
    rows: dict[str, Row] = {}
    verdicts = {True: Verdict(), False: Verdict()}
    with zero_adapter(Path(adapter)) as zeros:
        for plugin, on_rank in each_rank(
            model,
            tensor_parallel_size,
            verdicts,
            fully_sharded=fully_sharded,
            max_lora_rank=rank,
            model_impl=model_impl,
        ):
            _check_rank(on_rank, zeros, plugin, rows, verdicts[plugin])
    return build_report(rows, verdicts)


def _check_rank(
    rank: offline.Rank, folder: Path, plugin: bool, rows: dict[str, Row], whole: Verdict
) -> None:
    """Load the adapter on one rank of one side; add its rows and worsen its verdicts."""
    manager = rank.lora_manager
    # The class's method is vLLM's own. Admission, which guards instances, is `examine` below.
    load = type(rank.worker_manager)._load_adapter
    try:
        adapter = load(rank.worker_manager, LoRARequest("adapter", 1, str(folder)))
    except Exception as error:
        whole.worsen(Outcome.REFUSED, format_error(error))
        return
    for weights in adapter.loras.values():
        # The zeros stand for values that were not read. A module that really is zero is no loss.
        for half in (weights.lora_a, weights.lora_b):
            if half is not None and half.numel():
                half[(0,) * half.ndim] = 1
    bypassed = set() if plugin else {id(r.layer) for r in find_readers(rank.model, [manager])}
    used: set[int] = set()
    for name, layer in manager.modules.items():
        weights_of = weights_for_layer(manager, adapter, name, layer)
        if not any(weights for _, weights in weights_of):
            continue
        used |= {id(weights) for _, weights in weights_of if weights}
        row = rows.setdefault(name, _row(name, weights_of))
        faults = validate_layer(manager, name, layer, weights_of)
        if plugin:
            row.by_table = row.by_table or is_by_table(layer)
            row.unservable = row.unservable or _find_refusal(layer, weights_of)
            if faults:
                row.plugin.worsen(Outcome.REFUSED, faults[0])
            if hasattr(layer, "plan"):
                row.plan.append(layer.plan)
        else:
            plan = row.plan[rank.group.rank] if row.plan else None
            row.stock.worsen(*judge_stock_layer(layer, plan, weights_of, faults))
            if row.unservable:
                row.stock.worsen(Outcome.WRONG, row.unservable)
            if id(getattr(layer, "base_layer", None)) in bypassed:
                row.stock.worsen(Outcome.IGNORED, "the model uses the layer past its LoRA")
    if plugin:
        findings = examine(manager, adapter)
        for fault in [*findings.faults, *findings.unmatched]:
            if ".experts" not in fault:
                whole.worsen(Outcome.REFUSED, fault)
    for name, weights in adapter.loras.items():
        # Experts are not judged (see `offline`).
        if id(weights) in used or ".experts" in name:
            continue
        row = rows.setdefault(name, _row(name, [(name, weights)]))
        if plugin:
            row.plugin.worsen(Outcome.REFUSED, "no layer of this model uses it")
        else:
            row.stock.worsen(Outcome.IGNORED, "no LoRA layer uses it, and vLLM reports no error")


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


def _round_rank(config: Mapping[str, Any]) -> int:
    """Return the smallest value of ``--max-lora-rank`` that is enough for the adapter's ranks."""
    ranks = [int(config.get("r", 8)), *(config.get("rank_pattern") or {}).values()]
    return next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= max(ranks)), max(ranks))


@contextmanager
def zero_adapter(adapter: Path) -> Iterator[Path]:
    """Create an adapter with the same configuration, names, shapes and dtypes, and only zeros.

    Its file of tensors is sparse: it has the original's header and no data on the disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = adapter / "adapter_model.safetensors"
        with source.open("rb") as file:
            length = file.read(8)
            header = length + file.read(struct.unpack("<Q", length)[0])
        copy = Path(folder) / source.name
        copy.write_bytes(header)
        os.truncate(copy, source.stat().st_size)
        config = "adapter_config.json"
        (Path(folder) / config).write_text((adapter / config).read_text())
        yield Path(folder)
