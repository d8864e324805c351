# SPDX-License-Identifier: Apache-2.0
"""Read a fused layer's row layout from its own weight loader.

The rows of LoRA-B are the rows of the base weight. The loader that places the base weight's rows is
therefore the only authority on the place of LoRA-B's rows. It runs here on columns of row indices,
once per output and tensor-parallel rank. This package has no sharding rules of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import QKVParallelLinear

from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import get_notes
from vllm_nway_lora.rows.plan import Output


class LoaderError(PlanError):
    """A weight loader that does not run on row numbers."""


def read_outputs(layer: Any) -> list[Output]:
    """Return the place of each output's rows on this layer's rank, as its weight loader places them.

    The loader is the class's ``weight_loader``. It runs on a column of its own, never on
    ``layer.weight``: a quantised or CPU-packed layer drops that parameter after loading.

    Args:
        layer: a ``MergedColumnParallelLinear``, a ``QKVParallelLinear``, or a layer with ``shards``
            in its notes.

    Raises:
        LoaderError: the loader fails.
        PlanError: the ranks together do not hold every row of an output from its first to its last.
    """

    def load(shard: int | str, rank: int, column: Parameter, rows: torch.Tensor) -> None:
        own_rank = layer.tp_rank
        try:
            layer.tp_rank = rank
            layer.weight_loader(column, rows, shard)
        finally:
            layer.tp_rank = own_rank

    return [
        _read(layer, torch.arange(size), f"output {shard}", functools.partial(load, shard))
        for shard, size in list_shards(layer)
    ]


def list_shards(layer: Any) -> Sequence[tuple[int | str, int]]:
    """Return per output its shard id and its rows in a checkpoint."""
    shards = get_notes(layer).shards
    if shards is not None:
        return shards
    if isinstance(layer, QKVParallelLinear):
        # Its `output_sizes` count a key or value head once per rank that holds it.
        return [
            ("q", layer.total_num_heads * layer.head_size),
            ("k", layer.total_num_kv_heads * layer.head_size),
            ("v", layer.total_num_kv_heads * layer.v_head_size),
        ]
    return list(enumerate(layer.output_sizes))


def read_whole(layer: Any, loader_for_rank: Callable[[int], Callable[..., None]]) -> Output:
    """Return the place of the rows of a layer whose loader takes the whole weight at once.

    Args:
        layer: a ``ColumnParallelLinear``.
        loader_for_rank: returns the weight loader of a tensor-parallel rank.

    Raises:
        LoaderError: as :func:`read_outputs`.
        PlanError: as :func:`read_outputs`, or as ``loader_for_rank``.
    """
    return _read(
        layer,
        torch.arange(layer.output_size),
        "its one output",
        lambda rank, column, rows: loader_for_rank(rank)(column, rows),
    )


def _read(layer: Any, rows: torch.Tensor, what: str, load: Callable[..., None]) -> Output:
    columns = [_load_indices(layer, rank, rows, load) for rank in range(layer.tp_size)]
    held = torch.cat([column[column >= 0] for column in columns]).unique()
    # The `output_sizes` entry of a replicated output counts it once per rank (loaders of Kimi's and
    # GLM-5-Next's layers). A checkpoint has the rows that the ranks really hold.
    if not torch.equal(held, torch.arange(len(held))) or not len(held):
        raise PlanError(
            f"{layer.prefix}: its weight loader places rows {held.tolist()[:8]}... of {what} "
            f"({len(rows)} rows) on the {layer.tp_size} ranks, which leaves rows out"
        )
    return Output(rows=len(held), column=columns[layer.tp_rank])


def _load_indices(
    layer: Any, rank: int, rows: torch.Tensor, load: Callable[..., None]
) -> torch.Tensor:
    """Run ``rank``'s loader on row indices; return the index in each local row, -1 where none is."""
    column = Parameter(
        torch.full((layer.output_size_per_partition, 1), -1, dtype=torch.int64, device="cpu"),
        requires_grad=False,
    )
    column.output_dim, column.input_dim = 0, 1
    try:
        load(rank, column, rows.to("cpu").unsqueeze(1))
    except PlanError:
        raise
    except Exception as error:  # any class of layers, also of other packages
        raise LoaderError(
            f"{layer.prefix}: its weight loader fails on row numbers ({type(error).__name__}: {error})"
        ) from error
    return column.data.squeeze(1)
