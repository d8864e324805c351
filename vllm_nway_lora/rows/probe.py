# SPDX-License-Identifier: Apache-2.0
"""Read a fused layer's row layout out of its own weight loader.

The rows of LoRA-B are the rows of the base weight, so the loader that places the base weight's rows
is the only authority on where LoRA-B's go. It is run here on columns of row indices, once per
output and tensor-parallel rank; nothing about sharding is derived a second time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import QKVParallelLinear

from vllm_nway_lora.plan import Output, PlanError

#: On a base layer: output index -> the rows of a checkpoint, as its model hands them to the layer's
#: loader, where that is not all of them in order. See :mod:`vllm_nway_lora.k2_horizon`.
HANDED_ROWS_ATTRIBUTE = "_nway_lora_handed_rows"

#: On a base layer: per output, its shard id and the rows that a checkpoint has for it, where the
#: layer does not say so itself. See :mod:`vllm_nway_lora.muse_spark`.
SHARDS_ATTRIBUTE = "_nway_lora_shards"

#: On a base layer: the weight loader that its model set on the weight, kept by :func:`remember`.
_LOADER_ATTRIBUTE = "_nway_lora_weight_loader"


def read_outputs(layer: Any) -> list[Output]:
    """Return where ``layer``'s weight loader places each output's rows on this layer's rank.

    The loader is the class's ``weight_loader`` run on a column of its own, never on ``layer.weight``:
    quantised and CPU-packed layers have no such parameter any more once they are loaded.

    Args:
        layer: a ``MergedColumnParallelLinear``, a ``QKVParallelLinear``, or one that is marked with
            its shards.

    Raises:
        PlanError: the ranks together do not hold every row of an output from its first to its last.
    """
    handed = getattr(layer, HANDED_ROWS_ATTRIBUTE, {})

    def load(shard: int | str, rank: int, column: Parameter, rows: torch.Tensor) -> None:
        own_rank = layer.tp_rank
        try:
            layer.tp_rank = rank
            layer.weight_loader(column, rows, shard)
        finally:
            layer.tp_rank = own_rank

    return [
        _read(
            layer,
            handed.get(output, torch.arange(size)),
            f"output {shard}",
            functools.partial(load, shard),
        )
        for output, (shard, size) in enumerate(shards(layer))
    ]


def shards(layer: Any) -> list[tuple[int | str, int]]:
    """Return, per output, its shard id and the rows that a checkpoint has for it."""
    noted: list[tuple[int | str, int]] | None = getattr(layer, SHARDS_ATTRIBUTE, None)
    if noted is not None:
        return noted
    if isinstance(layer, QKVParallelLinear):
        # Its `output_sizes` count a key or value head once per rank that has it.
        return [
            ("q", layer.total_num_heads * layer.head_size),
            ("k", layer.total_num_kv_heads * layer.head_size),
            ("v", layer.total_num_kv_heads * layer.v_head_size),
        ]
    return list(enumerate(layer.output_sizes))


def read_whole(layer: Any, loader: Callable[..., None]) -> Output:
    """Return where a loader that takes the whole weight places its rows on this layer's rank.

    Args:
        layer: a ``ColumnParallelLinear``.
        loader: what :func:`parameter_loader` returned for it.

    Raises:
        PlanError: as :func:`read_outputs`, or the loader cannot be run for another rank.
    """
    return _read(
        layer,
        torch.arange(layer.output_size),
        "its one output",
        lambda rank, column, rows: _for_rank(layer, loader, rank)(column, rows),
    )


def remember(layer: Any) -> None:
    """Keep the loader that a model has set on ``layer.weight``, which may not outlive the loading."""
    loader = getattr(layer.weight, "weight_loader", None)
    # The layer's own method is no loader of the model's, and is found again on the class.
    if loader is not None and getattr(loader, "__self__", None) is not layer:
        setattr(layer, _LOADER_ATTRIBUTE, loader)


def parameter_loader(layer: Any) -> Callable[..., None] | None:
    """Return the loader that a model set on ``layer``'s weight, or None where it is the layer's own."""
    loader: Callable[..., None] | None = getattr(layer, _LOADER_ATTRIBUTE, None)
    return loader


def _for_rank(layer: Any, loader: Callable[..., None], rank: int) -> Callable[..., None]:
    """Make the loader that ``rank`` has, by the function that made this rank's.

    A loader on a parameter is a closure (``mamba_v2_sharded_weight_loader`` in
    vllm/model_executor/layers/mamba/mamba_mixer2.py, 0.17.0 to 0.33.0), with the rank in it.
    """
    if rank == layer.tp_rank:
        return loader
    factory = getattr(
        sys.modules.get(loader.__module__), loader.__qualname__.partition(".")[0], None
    )
    arguments = dict(inspect.getclosurevars(loader).nonlocals)
    if factory is None or set(inspect.signature(factory).parameters) != set(arguments):
        raise PlanError(f"{layer.prefix}: its weight loader {loader} says nothing of other ranks")
    if "tp_rank" not in arguments:
        raise PlanError(f"{layer.prefix}: its weight loader {loader} does not depend on a rank")
    made: Callable[..., None] = factory(**{**arguments, "tp_rank": rank})
    return made


def _read(layer: Any, rows: torch.Tensor, what: str, load: Callable[..., None]) -> Output:
    columns = [_load_indices(layer, rank, rows, load) for rank in range(layer.tp_size)]
    held = torch.cat([column[column >= 0] for column in columns]).unique()
    # A replicated output's `output_sizes` entry is inflated by the number of ranks (loaders of
    # Kimi's and GLM-5-Next's layers); what the ranks really hold is what a checkpoint has.
    if not torch.equal(held, torch.arange(len(held))) or not len(held):
        raise PlanError(
            f"{layer.prefix}: its weight loader places rows {held.tolist()[:8]}... of {what} "
            f"({len(rows)} rows) on the {layer.tp_size} ranks, which leaves rows out"
        )
    return Output(rows=len(held), column=columns[layer.tp_rank])


def _load_indices(
    layer: Any, rank: int, rows: torch.Tensor, load: Callable[..., None]
) -> torch.Tensor:
    """Run the loader as ``rank`` would on row indices; -1 where it loads none."""
    column = Parameter(
        torch.full((layer.output_size_per_partition, 1), -1, dtype=torch.int64, device="cpu"),
        requires_grad=False,
    )
    column.output_dim, column.input_dim = 0, 1
    load(rank, column, rows.to("cpu").unsqueeze(1))
    return column.data.squeeze(1)
