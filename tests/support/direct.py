"""vLLM's own functions that multiply by a layer's weight themselves, on modules without their constructors."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from support import gpu, gpu_layers
from support.gpu_layers import KernelCase
from support.layers import Fusion
from vllm_nway_lora.layers.direct import serve_direct_products

COMPRESSOR = Fusion("fused_wkv_wgate", (48, 48), ("wkv", "wgate"), ((0,), (1,)))
INDEXER = Fusion("wk_weights_proj", (128, 32), ("wk", "weights_proj"), ((0,), (1,)))
#: The slot of each token.
SLOTS = [2, 0, -1, 1, 0, 0, 2, -1]
#: Package -> function that multiplies by the weights of the compressors, in releases that have it.
FUNCTIONS = [
    ("vllm.models.deepseek_v4", "attn_gemm_parallel_execute"),
    ("vllm.models.deepseek_v4", "_run_parallel_input_projections"),
    ("vllm.models.deepseek_v41", "_run_parallel_input_projections"),
]


def make_case(fusion: Fusion) -> KernelCase:
    """Return the case of a layer: adapters on both modules, on the second and on the first."""
    return KernelCase("direct", fusion, ((0, 1), (1,), (0,)))


def expect(fusion: Fusion, lora: bool) -> torch.Tensor:
    """Return what a layer must compute for the tokens, with LoRA or without, in float64."""
    return gpu_layers.dense(make_case(fusion), SLOTS if lora else [-1] * len(SLOTS))


@contextlib.contextmanager
def mm_on_cpu() -> Iterator[None]:
    """Give torch on CPU the product with another type, which it has on GPUs only."""
    library = torch.library.Library("aten", "IMPL")
    if not gpu.is_native():
        library.impl("mm.dtype", lambda x, y, dtype: x.to(dtype) @ y.to(dtype), "CPU")
    yield
    library._destroy()


def build(owner: str, **fields: Any) -> Any:
    """Build a module of a class of vLLM without its constructor."""
    module, _, name = owner.rpartition(".")
    kind = type(name, (getattr(importlib.import_module(module), name),), {})
    kind.__abstractmethods__ = frozenset()  # of the platforms' classes
    built = kind.__new__(kind)
    nn.Module.__init__(built)
    for field, value in fields.items():
        setattr(built, field, value)
    return built


def is_there(package: str, function: str) -> bool:
    """Return whether this release of vLLM has a function of :data:`FUNCTIONS`."""
    try:
        module = importlib.import_module(f"{package}.attention")
    except ImportError:
        return False
    # The class has another name in 0.22, which has no LoRA on it.
    return hasattr(getattr(module, "DeepseekV4Attention", None), function)


def call_attention(
    package: str, function: str, layers: list[Any], x: torch.Tensor, served: bool
) -> list[torch.Tensor]:
    """Return what a function of an attention makes of ``x`` with the weights of its compressors.

    Args:
        package: as in :data:`FUNCTIONS`.
        function: likewise.
        layers: the LoRA layers of both compressors.
        x: ``(tokens, columns)``.
        served: whether the package serves LoRA on them.
    """
    compressors = [
        build(f"{package}.compressor.DeepseekCompressor", fused_wkv_wgate=layer) for layer in layers
    ]
    indexer: Any = nn.Module()
    indexer.compressor, indexer.weights_proj = compressors[1], _returning(None)
    attention = build(
        f"{package}.attention.DeepseekV4Attention",
        compressor=compressors[0],
        indexer=indexer,
        fused_wqa_wkv=_returning(None),
        shard_fused_wqa_wkv=False,
        aux_stream_list=None,
        ln_events=[None] * 4,
    )
    if served:
        serve_direct_products(nn.Sequential(attention))
    return [product for product in getattr(attention, function)(x) if product is not None]


def call_indexer(
    layer: Any, x: torch.Tensor, served: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Any]:
    """Return the keys and the weights that GLM-5-Next's indexer computes, in two calls, and the indexer."""
    path = "vllm.models.glm5next.common.attention"
    indexer = build(
        f"{path}.Indexer",
        head_dim=128,
        n_head=32,
        rope_dim=0,
        quant_block_size=128,
        scale_fmt="ue8m0",
        softmax_scale=1.0,
        index_kpool=1,
        index_kpool_compress_ape=None,
        index_kpool_compress_gate=x.new_zeros(128, x.shape[1]),
        k_norm=SimpleNamespace(weight=None, bias=None, eps=0.0),
        wq_b=_returning(x.new_zeros(len(x), 32 * 128)),
        wk_weights_proj=layer,
        indexer_op=lambda hidden, q, k, weights, **_: (k, weights),
        _wp_fp32=None,
    )
    if served:
        serve_direct_products(nn.Sequential(indexer))
    kernels = {
        "_fused_indexer_k_norm": lambda k, *_: k,
        "fwht128_quant_fp8": lambda q: (q, q.new_ones(len(q))),
        "_fused_indexer_weight_scale": lambda weights, *_: weights,
    }
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch(f"{path}.{name}", kernel))
        return [indexer(x, None, None, None) for _ in range(2)], indexer


def _returning(tensor: torch.Tensor | None) -> Callable[..., Any]:
    return lambda *_: (tensor, None)
