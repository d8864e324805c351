"""Multiply-adds of LoRA layers, counted as they run, and the least that an adapter needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode


class GivenOutput:
    """A quantisation method that multiplies nothing: LoRA is added to an output that is there."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return self.output


@contextlib.contextmanager
def without_base(layer: Any, output: torch.Tensor) -> Iterator[None]:
    """Have a LoRA layer add its LoRA part to ``output`` instead of the base layer's product."""
    with mock.patch.object(layer.base_layer, "quant_method", GivenOutput(output)):
        yield


def multiply_adds(function: Callable[[], Any]) -> int:
    """Return the multiply-adds of the matrix products in ``function``."""
    from vllm_nway_lora import cpu_kernels

    def addmm_in_place(summand: Any, a: Any, b: Any, **arguments: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # PyTorch counts what operators are called, and sees our own from outside only.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
    ours = torch.ops.nway_lora
    with (
        mock.patch.object(ours, "shrink", cpu_kernels._shrink),
        mock.patch.object(ours, "expand", cpu_kernels._expand),
        counter,
    ):
        function()
    return counter.get_total_flops() // 2


def floor(
    tokens: int, modules: int, input_size: int, output_rows: int, rank: int, a_shards: int = 1
) -> int:
    """Return the adapter's own arithmetic on one rank: per module one shrink and one expand.

    Args:
        tokens: those with an adapter.
        modules: as adapters see the projection.
        input_size: columns of each module's A.
        output_rows: rows of all modules' B that the rank holds.
        rank: LoRA's r.
        a_shards: ranks among which A's rows are divided.
    """
    return tokens * rank * (modules * input_size // a_shards + output_rows)
