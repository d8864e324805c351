"""LoRA in products that a model computes with a layer's weight itself: exact, or refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support import direct, gpu, gpu_layers
from support.cpu import disable_pinned_memory
from support.direct import COMPRESSOR, INDEXER, SLOTS
from support.layers import Fusion, map_tokens, set_adapter
from support.mla import make_punica_wrapper
from torch import nn
from vllm.model_executor.layers import utils

from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.layers import direct as module
from vllm_nway_lora.layers.direct import DirectError, DirectWeight, serve_direct_products
from vllm_nway_lora.layers.punica import group_by_adapter
from vllm_nway_lora.layers.readers import find_refusals

SERVED = pytest.mark.parametrize("served", [False, True], ids=["as-it-was", "served"])


def build_layer(fusion: Fusion) -> tuple[Any, torch.Tensor]:
    """Return a LoRA layer whose tokens are mapped, in bfloat16, and its input."""
    offline.initialize()
    disable_pinned_memory()
    gpu_layers.set_plugin(True)
    case = direct.make_case(fusion)
    packing = mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", gpu.use_torch_linear)
    with packing, gpu_layers.on_rank(offline.StandInGroup(0, 1)):
        layer, config = gpu_layers.build(case, torch.bfloat16, "cpu")
        for slot, adapter in enumerate(gpu_layers.tensors(case).adapters):
            set_adapter(layer, slot, [pair and [t.bfloat16() for t in pair] for pair in adapter])
    wrapper = group_by_adapter(make_punica_wrapper(config))
    map_tokens(wrapper, SLOTS)
    layer.set_mapping(wrapper)
    return layer, gpu_layers.inputs(case, len(SLOTS)).bfloat16()


@SERVED
@pytest.mark.parametrize(("package", "function"), direct.FUNCTIONS)
def test_compressors(package: str, function: str, served: bool) -> None:
    if not direct.is_there(package, function):
        pytest.skip(f"this release of vLLM has no {package}, or no {function}")
    layers, [x, _] = zip(*(build_layer(COMPRESSOR) for _ in range(2)), strict=True)
    with direct.mm_on_cpu():
        products = direct.call_attention(package, function, list(layers), x, served)
    assert len(products) == 2 - ("v41" in package)
    for product in products:
        assert product.dtype == torch.float32
        assert torch.equal(product.double(), direct.expect(COMPRESSOR, lora=served))


@SERVED
def test_indexer(served: bool) -> None:
    pytest.importorskip("vllm.models.glm5next.common.attention")
    layer, x = build_layer(INDEXER)
    results, indexer = direct.call_indexer(layer, x, served)
    for keys, weights in results:
        assert torch.equal(keys.double(), direct.expect(INDEXER, lora=True)[:, :128])
        assert weights.dtype == torch.float32
        assert torch.equal(weights.double(), direct.expect(INDEXER, lora=served)[:, 128:])
    assert isinstance(indexer._wp_fp32, DirectWeight) is served


class DeepseekCompressor(nn.Module):
    """A module with the name of vLLM's class."""


class OtherAttention(nn.Module):
    """An attention that uses the weight of its compressor in another way than is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return another product."""
        weight: torch.Tensor = self.compressor.fused_wkv_wgate.weight
        return nn.functional.linear(x, weight)


def test_other_reader_is_refused() -> None:
    layer, x = build_layer(COMPRESSOR)
    attention: Any = OtherAttention()
    attention.compressor = DeepseekCompressor()
    attention.compressor.fused_wkv_wgate = layer
    serve_direct_products(attention)
    assert {
        module: "OtherAttention.forward" in r for module, r in find_refusals(layer).items()
    } == {
        "wkv": True,
        "wgate": True,
    }
    assert torch.equal(attention(x), nn.functional.linear(x, layer.base_layer.weight))


def test_model_is_read_once_for_all_compressors() -> None:
    layers = [build_layer(COMPRESSOR)[0] for _ in range(3)]
    model = nn.Module()
    for number, layer in enumerate(layers):
        compressor: Any = DeepseekCompressor()
        compressor.fused_wkv_wgate = layer
        model.add_module(str(number), compressor)
    with mock.patch.object(module, "_list_readers", wraps=module._list_readers) as read:
        serve_direct_products(model)
    assert read.call_count == 1
    [served] = {type(layer) for layer in layers}
    assert all(isinstance(layer.weight, DirectWeight) for layer in layers), served


def test_changed_indexer_is_refused() -> None:
    layer, _ = build_layer(INDEXER)
    indexer: Any = nn.Module()
    indexer.wk_weights_proj, indexer.head_dim, indexer.n_head = layer, 128, 32
    indexer._wp_fp32 = torch.zeros(1)  # made before the model was wrapped
    serve_direct_products(indexer)
    assert list(find_refusals(layer)) == ["weights_proj"]


def test_indexer_with_other_attributes_is_refused() -> None:
    layer, _ = build_layer(INDEXER)
    indexer: Any = nn.Module()
    indexer.wk_weights_proj, indexer._wp_fp32 = layer, None
    serve_direct_products(indexer)
    assert "has no attribute 'head_dim'" in find_refusals(layer)["weights_proj"]


def test_another_use_of_the_weight_raises() -> None:
    layer, x = build_layer(COMPRESSOR)
    weight = DirectWeight(layer, 0, slice(None), copied=False)
    for call in (
        lambda: torch.addmm(x, x, weight),
        lambda: torch.mm(weight, x),
        lambda: x @ weight,
    ):
        with pytest.raises(DirectError, match="Report this"):
            call()
