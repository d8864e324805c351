# SPDX-License-Identifier: Apache-2.0
"""Read a fused layer's row layout out of its own weight loader.

The rows of LoRA-B are the rows of the base weight, so the loader that places the base weight's rows
is the only authority on where LoRA-B's go. It is run here on columns of row indices, once per
output and tensor-parallel rank; nothing about sharding is derived a second time.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from vllm_nway_lora.plan import Output, PlanError


def read_outputs(layer: MergedColumnParallelLinear) -> list[Output]:
    """Return where ``layer``'s weight loader places each output's rows on this layer's rank.

    The loader is the class's ``weight_loader`` run on a column of its own, never on ``layer.weight``:
    quantised and CPU-packed layers have no such parameter any more once they are loaded.

    Raises:
        PlanError: the ranks together do not hold every row of an output from its first to its last.
    """
    return [_read_output(layer, shard, size) for shard, size in enumerate(layer.output_sizes)]


def _read_output(layer: MergedColumnParallelLinear, shard: int, size: int) -> Output:
    columns = [_load_indices(layer, rank, shard, size) for rank in range(layer.tp_size)]
    held = torch.cat([column[column >= 0] for column in columns]).unique()
    # A replicated output's `output_sizes` entry is inflated by the number of ranks (loaders of
    # Kimi's and GLM-5-Next's layers); what the ranks really hold is what a checkpoint has.
    if not torch.equal(held, torch.arange(len(held))) or not len(held):
        raise PlanError(
            f"{layer.prefix}: its weight loader places rows {held.tolist()[:8]}... of output "
            f"{shard} ({size} rows) on the {layer.tp_size} ranks, which leaves rows out"
        )
    return Output(rows=len(held), column=columns[layer.tp_rank])


def _load_indices(
    layer: MergedColumnParallelLinear, rank: int, shard: int, size: int
) -> torch.Tensor:
    """Run the loader as ``rank`` would on the indices 0 to ``size - 1``; -1 where it loads none."""
    column = Parameter(
        torch.full((layer.output_size_per_partition, 1), -1, dtype=torch.int64, device="cpu"),
        requires_grad=False,
    )
    column.output_dim, column.input_dim = 0, 1
    indices = torch.arange(size, dtype=torch.int64, device="cpu").unsqueeze(1)
    own_rank = layer.tp_rank
    try:
        layer.tp_rank = rank
        layer.weight_loader(column, indices, shard)
    finally:
        layer.tp_rank = own_rank
    return column.data.squeeze(1)
