# SPDX-License-Identifier: Apache-2.0
"""Trace a model's layers, and note on each what its weight holds of which module."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_nway_lora.models import mamba2, muse_spark, tables
from vllm_nway_lora.models.names import checkpoint_names
from vllm_nway_lora.models.traced_experts import trace_experts
from vllm_nway_lora.models.without_lora import TRANSPOSED
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.held import Held, gather
from vllm_nway_lora.rows.notes import get_notes, set_notes
from vllm_nway_lora.rows.probe import list_shards, read_outputs
from vllm_nway_lora.rows.recorder import fold, record
from vllm_nway_lora.rows.trace import Traced, trace_modules
from vllm_nway_lora.rows.twin import build_twin

logger = logging.getLogger("vllm.nway_lora")

_VLLM_LOADERS = (MergedColumnParallelLinear.weight_loader, QKVParallelLinear.weight_loader)


def trace_model(model: nn.Module, mapping: Mapping[str, Sequence[str]]) -> None:
    """Trace the layers of ``model`` that take LoRA and set their notes; log and leave the rest untraced.

    Args:
        model: the built model, not wrapped for LoRA yet.
        mapping: fused projection's name -> its adapter-visible modules.
    """
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return
    started = time.perf_counter()
    try:
        twin = build_twin(model, vllm_config)
        found, refused = _trace(model, twin, mapping)
        by_table = _note(model, found, refused)
        by_table += trace_experts(model, twin, mapping)
    except Exception as error:  # any constructor or loader, also of other packages
        logger.info(
            "vllm-nway-lora cannot trace %s (%s: %s). The rows of its fused projections are those of "
            "its layers' weight loaders.",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return
    logger.info(
        "vllm-nway-lora has traced %d layers of %s in %.1f s. By table: %s.",
        len(found),
        type(model).__name__,
        time.perf_counter() - started,
        ", ".join(by_table) or "none",
    )


def _note(
    model: nn.Module,
    found: Mapping[str, Mapping[str, Held]],
    refused: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Set the notes of the model's layers; return the folded paths of those that are not traced."""
    by_table = []
    for path, layer in model.named_modules():
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            continue
        if path in refused:
            set_notes(layer, refusals={**refused[path], **get_notes(layer).refusals})
        held = found.get(path)
        if held and all(_has_shape(layer, part) for part in held.values()):
            set_notes(layer, traced=held)
            if isinstance(layer, VocabParallelEmbedding) and not _is_straight(*held.values()):
                _refuse_embedding(model, path, layer)
        else:
            by_table.append(fold(path))
    return list(dict.fromkeys(by_table))


def _has_shape(layer: Any, held: Held) -> bool:
    """Return whether a layer of the model has the shape of the twin's: quantisation can change it."""
    if isinstance(layer, VocabParallelEmbedding):
        return bool(len(held.columns) == layer.embedding_dim)
    rows: int = getattr(layer, "output_size_per_partition", layer.output_size)
    columns: int = getattr(layer, "input_size_per_partition", layer.input_size)
    return (len(held.rows), len(held.columns)) == (rows, columns)


def _is_straight(held: Held) -> bool:
    """Return whether an embedding has the checkpoint's rows in order, as vLLM's LoRA on it takes them."""
    rows = held.rows[held.rows >= 0]  # none on a rank that has padding only
    first = int(rows[0]) if len(rows) else 0
    expected = torch.arange(first, first + len(rows))
    is_whole: bool = torch.equal(held.rows[: len(rows)], expected)
    return is_whole and torch.equal(held.columns, torch.arange(len(held.columns)))


def _refuse_embedding(model: nn.Module, path: str, layer: nn.Module) -> None:
    name = path.rpartition(".")[2]
    reason = "its model reorders the vocabulary or its columns, and vLLM's LoRA on it does not"
    # vLLM's LoRA on lm_head replaces the logits processor.
    others = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    for noted in (layer, *(others if isinstance(layer, ParallelLMHead) else ())):
        set_notes(noted, refusals={**get_notes(noted).refusals, name: reason})


class _Transposing:
    """A twin whose checkpoint stores each weight of a linear layer transposed."""

    def __init__(self, twin: nn.Module) -> None:
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin, name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load weights, given as output by input."""
        return self._twin.load_weights((name, weight.t()) for name, weight in weights)


def _trace(
    model: nn.Module, twin: nn.Module, mapping: Mapping[str, Sequence[str]]
) -> tuple[dict[str, dict[str, Held]], dict[str, dict[str, str]]]:
    """Return per layer what it holds of its modules, and the modules that must be refused."""
    muse_spark.prepare(twin)
    reader: Any = _Transposing(twin) if type(model).__name__ in TRANSPOSED else twin
    layers = {
        path: layer
        for path, layer in twin.named_modules()
        if isinstance(layer, (LinearBase, VocabParallelEmbedding))
        and getattr(layer, "weight", None) is not None
    }
    wanted: dict[tuple[str, str], tuple[int, int]] = {}
    for path, layer in layers.items():
        if isinstance(layer, VocabParallelEmbedding):
            wanted[path, path.rpartition(".")[2]] = (layer.org_vocab_size, layer.embedding_dim)
            continue
        modules = list(mapping.get(path.rpartition(".")[2], ())) or [path.rpartition(".")[2]]
        for module, rows in zip(modules, _rows_of(model, twin, path, layer, modules), strict=False):
            wanted[path, module] = (rows, layer.input_size)
    traced: dict[tuple[str, str], Traced] = {}
    names = {
        (path, module): checkpoint_names(model, _sibling(path, module)) for path, module in wanted
    }
    while True:
        asked = {
            of[0]: key for key, of in names.items() if of and not traced.get(key, Traced()).places
        }
        if not asked:
            break
        results = trace_modules(reader, {name: wanted[key] for name, key in asked.items()})
        traced |= {asked[name]: result for name, result in results.items()}
        fewer = {
            n: shape for n, key in asked.items() if (shape := _unrepeat(wanted[key], results[n]))
        }
        for name, result in (trace_modules(reader, fewer) if fewer else {}).items():
            if _received(result) == {wanted[asked[name]][0]}:
                traced[asked[name]], wanted[asked[name]] = result, fewer[name]
        names = {key: of[1:] for key, of in names.items()}
    return _gather(twin, layers, wanted, traced), _find_changed(traced)


def _received(result: Traced) -> set[int]:
    return {place.received for place in result.places}


def _unrepeat(shape: tuple[int, int], result: Traced) -> tuple[int, int] | None:
    """Return the shape of a weight whose rows the model repeats before the layer's loader runs.

    K2-Horizon's layer counts a key head once per rank that holds it, and its model repeats the heads.
    """
    rows, columns = shape
    received = max(_received(result), default=rows)
    times = received // rows
    if times < 2 or received % rows or rows % times:
        return None
    return rows // times, columns


def _find_changed(traced: Mapping[tuple[str, str], Traced]) -> dict[str, dict[str, str]]:
    """Return per layer the modules whose values their model changes, and the reason to refuse them."""
    refused: dict[str, dict[str, str]] = {}
    for (path, module), result in traced.items():
        if result.is_changed:
            refused.setdefault(path, {})[module] = (
                "its model changes the values of its weight while it loads them, so that LoRA's product "
                "is no addition to that weight"
            )
    return refused


def _gather(
    twin: nn.Module,
    layers: Mapping[str, Any],
    wanted: Mapping[tuple[str, str], tuple[int, int]],
    traced: Mapping[tuple[str, str], Traced],
) -> dict[str, dict[str, Held]]:
    """Return per layer, of those whose rows are all accounted for, what it holds of its modules."""
    paths = {id(parameter): path for path, parameter in twin.named_parameters()}
    modules_of: dict[str, list[str]] = {}
    for path, module in wanted:
        modules_of.setdefault(path, []).append(module)
    found: dict[str, dict[str, Held]] = {}
    for path, modules in modules_of.items():
        layer = layers[path]
        try:
            held = {
                module: gather(
                    traced[path, module], paths[id(layer.weight)], wanted[path, module][0]
                )
                for module in modules
                if traced.get((path, module), Traced()).places
            }
        except PlanError as error:
            logger.debug("%s is not traced: %s", path, error)
            continue
        if held and (len(held) == len(modules) or _fill(held)):
            found[path] = held
    return found


def _fill(held: Mapping[str, Held]) -> bool:
    """Return whether modules fill all rows of a layer, so that no other module has any."""
    filled = torch.stack([part.rows >= 0 for part in held.values()])
    return bool(filled.any(0).all())


def _rows_of(
    model: nn.Module, twin: nn.Module, path: str, layer: Any, modules: Sequence[str]
) -> list[int]:
    """Return the rows over all ranks of each module of a layer; none if they are not known."""
    is_fused = isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear))
    if not is_fused and get_notes(layer).shards is None:
        return [mamba2.checkpoint_rows(layer)] if len(modules) == 1 else []
    sizes = [rows for _, rows in list_shards(layer)]
    if type(layer).weight_loader not in _VLLM_LOADERS:
        # It may replicate an output, whose size it then counts once per rank.
        with contextlib.suppress(PlanError):
            sizes = [output.rows for output in read_outputs(layer)]
    groups: Sequence[Sequence[Any]] | None = tables.outputs_by_module(
        path.rpartition(".")[2], modules, len(sizes)
    )
    if groups is None:
        groups = _find_groups(model, twin, path, modules, (sum(sizes), layer.input_size))
    if not all(group and set(group) <= set(range(len(sizes))) for group in groups):
        return []
    return [sum(sizes[output] for output in group) for group in groups]


def _find_groups(
    model: nn.Module, twin: nn.Module, path: str, modules: Sequence[str], shape: tuple[int, int]
) -> Sequence[Sequence[Any]]:
    """Return per module the shard ids that its model passes to the layer's loader with it."""
    found = []
    for module in modules:
        names = checkpoint_names(model, _sibling(path, module))[:1]
        calls, _ = record(twin, {name: torch.empty(shape, device="meta") for name in names})
        found.append([shard for of in calls.values() for call in of for shard in call.shard_ids()])
    return found


def _sibling(path: str, module: str) -> str:
    parent = path.rpartition(".")[0]
    return f"{parent}.{module}" if parent else module
