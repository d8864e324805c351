"""Multiply-adds of LoRA layers: a counter, and the minimum that an adapter needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode


class GivenOutput:
    """A quantisation method that returns a given output instead of multiplying."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return self.output


@contextlib.contextmanager
def without_base(layer: Any, output: torch.Tensor) -> Iterator[None]:
    """Replace the base layer's product by ``output``, to which the layer then adds its LoRA part."""
    with mock.patch.object(layer.base_layer, "quant_method", GivenOutput(output)):
        yield


def multiply_adds(function: Callable[[], Any]) -> int:
    """Return the number of multiply-adds in the matrix products that ``function`` computes."""

    def addmm_in_place(summand: Any, a: Any, b: Any, **arguments: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
    with counter:
        function()
    return counter.get_total_flops() // 2


def floor(
    tokens: int, modules: int, input_size: int, output_rows: int, rank: int, a_shards: int = 1
) -> int:
    """Return the minimum of multiply-adds on one TP rank: one shrink and one expand per module.

    Args:
        tokens: number of tokens with an adapter.
        modules: number of the projection's modules, as adapters see them.
        input_size: columns of each module's LoRA-A.
        output_rows: rows of all modules' LoRA-B on this TP rank.
        rank: LoRA's r.
        a_shards: number of TP ranks that share the rows of LoRA-A.
    """
    return tokens * rank * (modules * input_size // a_shards + output_rows)
