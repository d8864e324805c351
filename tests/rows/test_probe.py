"""Reading rows from a layer's weight loader, once per output and tensor-parallel rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import QKVParallelLinear

from vllm_nway_lora.diagnosis.offline import Rank, initialize
from vllm_nway_lora.diagnosis.stand_ins import StandInGroup
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.probe import LoaderError, list_shards, read_outputs, read_whole


class Layer:
    """The part of a merged layer that the probe uses, on rank 1 of 2; each output is split in two."""

    prefix = "model.layers.0.fused"

    def __init__(self, *output_sizes: int) -> None:
        self.tp_rank, self.tp_size = 1, 2
        self.output_sizes = list(output_sizes)
        self.output_size = sum(output_sizes)
        self.output_size_per_partition = self.output_size // 2
        self.ranks: list[int] = []

    def weight_loader(self, param: Any, weight: torch.Tensor, shard: int) -> None:
        self.ranks.append(self.tp_rank)
        start = sum(self.output_sizes[:shard]) // 2
        half = self.output_sizes[shard] // 2
        rows = weight[self.tp_rank * half : (self.tp_rank + 1) * half]
        param.data[start : start + len(rows)] = rows


def columns(outputs: Any) -> list[list[int]]:
    return [output.column.tolist() for output in outputs]


def test_outputs_are_those_of_the_layers_own_rank() -> None:
    layer = Layer(4, 6)
    outputs = read_outputs(layer)
    assert columns(outputs) == [[2, 3, -1, -1, -1], [-1, -1, 3, 4, 5]]
    assert [output.rows for output in outputs] == [4, 6]
    assert layer.ranks == [0, 1, 0, 1]
    assert layer.tp_rank == 1


def test_rank_is_restored_after_an_error() -> None:
    layer = Layer(4)

    def fail(*args: Any) -> None:
        raise KeyError("scale")

    layer.weight_loader = fail  # type: ignore[method-assign]
    words = r"model.layers.0.fused: its weight loader fails on row numbers \(KeyError: 'scale'\)"
    with pytest.raises(LoaderError, match=words):
        read_outputs(layer)
    assert layer.tp_rank == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 1], r"places rows \[0, 1, 4, 5\]\.\.\. of output 0 \(8 rows\) on the 2 ranks"),
        ([-1, -1], r"places rows \[\]\.\.\. of output 0 \(8 rows\)"),
    ],
)
def test_loader_that_leaves_rows_out_raises_error(rows: list[int], words: str) -> None:
    layer = Layer(8)

    def load(param: Any, weight: torch.Tensor, shard: int) -> None:
        for place, row in enumerate(rows):
            if row >= 0:
                param.data[place] = weight[layer.tp_rank * 4 + row]

    layer.weight_loader = load  # type: ignore[method-assign]
    with pytest.raises(PlanError, match=words):
        read_outputs(layer)


def test_whole_weight_is_read_with_each_ranks_loader() -> None:
    layer = Layer(6)

    def loader_for_rank(rank: int) -> Any:
        def load(param: Any, weight: torch.Tensor) -> None:
            param.data[:] = weight[rank::2]  # the ranks take turns

        return load

    output = read_whole(layer, loader_for_rank)
    assert output.rows == 6
    assert output.column.tolist() == [1, 3, 5]


def test_errors_of_the_factory_stay_as_they_are() -> None:
    def loader_for_rank(rank: int) -> Any:
        raise PlanError("no loader")

    with pytest.raises(PlanError, match="^no loader$"):
        read_whole(Layer(6), loader_for_rank)


def test_values_of_qkv_have_a_head_size_of_their_own() -> None:
    initialize()
    with Rank(StandInGroup(0, 1), VllmConfig()).current():
        layer = QKVParallelLinear(16, 4, 4, 2, bias=False, v_head_size=6, prefix="qkv_proj")
    assert list_shards(layer) == [("q", 16), ("k", 8), ("v", 12)]
