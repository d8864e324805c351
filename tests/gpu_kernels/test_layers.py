"""Fused layers on vLLM's GPU kernels equal dense arithmetic bit by bit, in a GPU's 16-bit types."""

from __future__ import annotations

import pytest
import torch
from support import gpu, gpu_layers
from support.gpu_cases import CASES, MAMBA, ODD, QKVG, QKVZ
from support.gpu_layers import KernelCase, KernelLayer

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_equals_dense_arithmetic(case: KernelCase, dtype: torch.dtype) -> None:
    assert gpu_layers.outcome(case, dtype, plugin=True) == "exact"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_stock_serves_it_or_not(case: KernelCase) -> None:
    """The same case on vLLM's own classes, as a control of the test itself."""
    expected = STOCK.get(case.title, "exact")
    assert gpu_layers.outcome(case, torch.float16, plugin=False) == expected


#: What vLLM's own classes do with the cases that they do not serve exactly.
STOCK = {
    "odd widths, modules left out": "refused",
    "one slot": "refused",  # z alone
    "TP 2": "refused",
    "TP 2, sharded": "refused",
    "TP 2, sharded, four modules": "not wrapped",
}


@pytest.mark.parametrize("size", [1, 2, 4], ids="tp{}".format)
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_ranks(rank: int, size: int) -> None:
    """Unequal widths, at every rank that vLLM has kernels for; sharded at TP 2 and 4."""
    case = KernelCase(
        "rank",
        ODD if size == 1 else QKVZ,
        rank=rank,
        max_rank=rank,
        size=size,
        fully_sharded=size > 1,
    )
    assert gpu_layers.outcome(case, torch.float16, plugin=True) == "exact"


@pytest.mark.parametrize("fusion", [QKVZ, MAMBA, QKVG], ids=lambda fusion: fusion.name)
def test_later_batches(fusion: gpu_layers.Fusion) -> None:
    """One layer serves batches of other sizes and adapters, and an adapter that replaces another."""
    everything = tuple(range(len(fusion.modules)))
    case = KernelCase("batches", fusion, (everything, everything[-1:]))
    layer = KernelLayer(case, torch.float16)
    for slots in ([0, 1, -1, 1], [-1] * 5, [1] * 9, [0]):
        assert torch.equal(layer(slots), gpu_layers.dense(case, slots))
    first = gpu_layers.tensors(case).adapters[1]
    for served in layer.layers:
        gpu_layers.set_adapter(served, 0, [p and [t.half() for t in p] for p in first])
    slots = [0, -1, 0]
    replaced = gpu_layers.dense(case, [1 if slot == 0 else slot for slot in slots])
    assert torch.equal(layer(slots), replaced)


def test_runs_where_it_says() -> None:
    layer = KernelLayer(CASES[0], torch.float16).layers[0]
    assert type(layer).__name__ == "NWayLinearWithLoRA"
    assert {tensor.device.type for tensor in layer.lora_b_stacked} == {gpu.device()}
    assert type(layer.punica_wrapper).__name__ == "PunicaWrapperGPU"
