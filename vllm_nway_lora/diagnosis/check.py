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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest

from vllm_nway_lora.adapters.admission import translate_and_examine
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.files import find_files
from vllm_nway_lora.adapters.fit import validate_layer, weights_for_layer
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.adapters.roads import any_layout
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.report import (
    Outcome,
    Report,
    Row,
    Verdict,
    build_report,
    fold_names,
)
from vllm_nway_lora.diagnosis.sides import (
    each_rank,
    format_error,
    is_by_table,
    judge_stock_experts,
    judge_stock_layer,
)
from vllm_nway_lora.layers.readers import find_readers, find_refusals

#: The names of dtypes in safetensors' format.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


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
        adapter: a local folder with ``adapter_config.json`` and the tensors, of which only names,
            shapes and dtypes are read.
        tensor_parallel_size: ``--tensor-parallel-size``.
        fully_sharded: ``--fully-sharded-loras``.
        max_lora_rank: ``--max-lora-rank``; by default the smallest value of vLLM's that is enough.
        model_impl: ``--model-impl``.

    Raises:
        FileNotFoundError: the adapter's folder lacks a file.
        AdapterError: the files of its tensors are incomplete, or of a type that is not read.
    """
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    rank = max_lora_rank or _round_rank(_read_ranks(config))
    rows: dict[str, Row] = {}
    verdicts = {True: Verdict(), False: Verdict()}
    rules: dict[str, None] = {}
    left_out: dict[str, dict[str, None]] = {}
    with zero_adapter(Path(adapter)) as zeros:
        for plugin, on_rank in each_rank(
            model,
            tensor_parallel_size,
            verdicts,
            fully_sharded=fully_sharded,
            max_lora_rank=rank,
            model_impl=model_impl,
        ):
            loaded = _load(on_rank, zeros, plugin, verdicts[plugin], left_out)
            if loaded is None:
                continue
            needed = max((weights.rank for weights in loaded.loras.values()), default=0)
            if not max_lora_rank and needed > rank and _round_rank([needed]) > rank:
                # A translation can need a higher rank than the file has.
                return check_adapter(
                    model,
                    adapter,
                    tensor_parallel_size=tensor_parallel_size,
                    fully_sharded=fully_sharded,
                    max_lora_rank=_round_rank([needed]),
                    model_impl=model_impl,
                )
            rules |= dict.fromkeys(get_origin(loaded).rules if plugin else ())
            known = {module for of in left_out.values() for module in of}
            _check_rank(on_rank, loaded, plugin, rows, verdicts[plugin], known)
    report = build_report(rows, verdicts)
    report.rules = list(rules)
    report.left_out = {reason: fold_names(modules) for reason, modules in left_out.items()}
    return report


def _load(
    rank: offline.Rank,
    folder: Path,
    plugin: bool,
    whole: Verdict,
    left_out: dict[str, dict[str, None]],
) -> Any:
    """Load the adapter on one rank of one side, with the plugin also in other layouts.

    Adds the modules that a server leaves out with a warning to ``left_out``.

    Returns:
        The ``LoRAModel``; None if it is refused, which worsens the verdict ``whole``.
    """
    # The class's method is vLLM's own. Admission, which guards instances, follows here.
    load = type(rank.worker_manager)._load_adapter
    try:
        with any_layout(rank.lora_manager) if plugin else nullcontext():
            adapter = load(rank.worker_manager, LoRARequest("adapter", 1, str(folder)))
    except Exception as error:
        whole.worsen(Outcome.REFUSED, format_error(error))
        return None
    for number, weights in enumerate(adapter.loras.values(), start=1):
        # The zeros stand for values that were not read. A module that really is zero is no loss.
        for half in (weights.lora_a, weights.lora_b):
            if half is not None and half.numel():
                half[(0,) * half.ndim] = number
    if plugin:
        findings, fault = translate_and_examine(rank.lora_manager, adapter)
        for text in [fault] if fault else [*findings.faults, *findings.unmatched]:
            whole.worsen(Outcome.REFUSED, text)
        if fault:
            return None
        for reason, modules in findings.left_out.items():
            left_out.setdefault(reason, {}).update(dict.fromkeys(modules))
        if findings.is_empty:
            whole.worsen(Outcome.REFUSED, "no module of it is left")
    return adapter


def _check_rank(
    rank: offline.Rank,
    adapter: Any,
    plugin: bool,
    rows: dict[str, Row],
    whole: Verdict,
    left_out: Collection[str],
) -> None:
    """Add the rows of one side's rank, or worsen the verdicts of those that are there."""
    manager = rank.lora_manager
    bypassed = set() if plugin else {id(r.layer) for r in find_readers(rank.model, [manager])}
    used: set[int] = set()
    for name, layer in manager.modules.items():
        weights_of = weights_for_layer(manager, adapter, name, layer)
        if not any(weights for _, weights in weights_of):
            if not plugin and name in rows:
                rows[name].stock.worsen(
                    Outcome.IGNORED, "vLLM finds no module of it in the adapter"
                )
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
        elif isinstance(layer, FusedMoEWithLoRA):
            row.stock.worsen(*judge_stock_experts(manager, name, adapter, faults))
        else:
            plan = row.plan[rank.group.rank] if row.plan else None
            row.stock.worsen(*judge_stock_layer(layer, plan, weights_of, faults))
            if row.unservable:
                row.stock.worsen(Outcome.WRONG, row.unservable)
            if id(getattr(layer, "base_layer", None)) in bypassed:
                row.stock.worsen(Outcome.IGNORED, "the model uses the layer past its LoRA")
    for name, weights in adapter.loras.items():
        if id(weights) in used or name in left_out:
            continue
        if plugin:
            row = rows.setdefault(name, _row(name, [(name, weights)]))
            row.plugin.worsen(Outcome.REFUSED, "no layer of this model uses it")
        else:
            whole.worsen(Outcome.IGNORED, f"no LoRA layer uses {name}, and vLLM reports no error")
    for name in rows.keys() - manager.modules.keys() if not plugin else ():
        rows[name].stock.worsen(
            Outcome.IGNORED, "vLLM has no LoRA layer there, and reports no error"
        )


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


@contextmanager
def zero_adapter(adapter: Path) -> Iterator[Path]:
    """Create an adapter with the same configuration, names, shapes and dtypes, and only zeros.

    Its files of tensors are sparse: they have headers and no data on the disk.
    """
    found = find_files(adapter)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in adapter.glob("*.json"):
            (folder / source.name).write_text(source.read_text())
        for source in found.paths if found else ():
            if source.suffix == ".safetensors":
                with source.open("rb") as file:
                    length = file.read(8)
                    header = length + file.read(struct.unpack("<Q", length)[0])
                size = source.stat().st_size
            else:
                header, size = _build_header(source)
                source = source.with_suffix(".safetensors")
            (folder / source.name).write_bytes(header)
            os.truncate(folder / source.name, size)
        yield folder


def _build_header(path: Path) -> tuple[bytes, int]:
    """Return the header of a pickled file's tensors in safetensors' format, and the whole size."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in torch.load(path, "meta", weights_only=True).items():
        start, end = end, end + tensor.nbytes
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"tensor {name} in {path.name} is {tensor.dtype}, and check reads "
                f"{', '.join(map(str, _DTYPES))}. Save the adapter in one of these types"
            )
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end
