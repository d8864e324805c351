"""LoRA in products that a model computes with a layer's weight itself: vLLM's own functions on its kernels."""

from __future__ import annotations

import pytest
import torch
from support import direct
from support.direct import COMPRESSOR, INDEXER, SLOTS
from support.gpu_layers import KernelLayer

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


def build_layer(fusion: direct.Fusion, dtype: torch.dtype) -> KernelLayer:
    """Return a layer whose tokens are mapped."""
    layer = KernelLayer(direct.make_case(fusion), dtype)
    layer.map_tokens(SLOTS)
    return layer


@DTYPES
@pytest.mark.parametrize(("package", "function"), direct.FUNCTIONS)
def test_compressors(package: str, function: str, dtype: torch.dtype) -> None:
    if not direct.is_there(package, function):
        pytest.skip(f"this release of vLLM has no {package}, or no {function}")
    layers = [build_layer(COMPRESSOR, dtype) for _ in range(2)]
    with direct.mm_on_cpu():
        products = direct.call_attention(
            package, function, [one.layers[0] for one in layers], layers[0].input(len(SLOTS)), True
        )
    assert len(products) == 2 - ("v41" in package)
    for product in products:
        assert torch.equal(product.double().cpu(), direct.expect(COMPRESSOR, lora=True))


@DTYPES
def test_indexer(dtype: torch.dtype) -> None:
    pytest.importorskip("vllm.models.glm5next.common.attention")
    layer = build_layer(INDEXER, dtype)
    results, _ = direct.call_indexer(layer.layers[0], layer.input(len(SLOTS)), True)
    for keys, weights in results:
        found = torch.cat([keys.double(), weights.double()], 1)
        assert torch.equal(found.cpu(), direct.expect(INDEXER, lora=True))
