"""The sixteen cases of ``tests/gpu_kernels``: a layer, its adapters and a batch."""

from __future__ import annotations

from support.gpu_layers import KernelCase
from support.layers import Fusion

_QKV_AND_Z = ("in_proj_qkv", "in_proj_z"), ((0, 1, 2), (3,))
_FOUR = ("q_proj", "k_proj", "v_proj", "g_proj"), ((0,), (1,), (2,), (3,))
#: Qwen3.5 with v wider than k, and with k as wide as v.
QKVZ = Fusion("in_proj_qkvz", (32, 32, 64, 64), *_QKV_AND_Z)
EQUAL = Fusion("in_proj_qkvz", (32, 32, 32, 32), *_QKV_AND_Z)
#: Widths that are no multiple of a kernel's block.
ODD = Fusion("in_proj_qkvz", (40, 40, 72, 72), *_QKV_AND_Z)
MAMBA = Fusion("in_proj", (64, 64, 24, 24, 8), ("in_proj",), ((0, 1, 2, 3, 4),))
WHOLE = Fusion("in_proj_qkvz", (200,), ("in_proj_qkvz",), ((0,),))
QKVG = Fusion("in_proj_qkvg", (64, 32, 32, 64), *_FOUR)

CASES = (
    KernelCase("v wider than k", QKVZ),
    KernelCase("all outputs of one width", EQUAL),
    KernelCase("odd widths, modules left out", ODD, ((0, 1), (0,), (1,), (0, 1))),
    KernelCase("one slot", ODD, ((1,),), max_loras=1),
    KernelCase("no token with LoRA", ODD, slots=(-1,) * 12),
    KernelCase("61 tokens of one adapter", ODD, slots=(*[-1] * 3, *[0] * 61)),
    KernelCase("rank 16 of 64", ODD, rank=16, max_rank=64),
    KernelCase("rank 128", ODD, rank=128, max_rank=128),
    KernelCase("odd input width", ODD, columns=72),
    KernelCase("one module, five outputs", MAMBA, ((0,),)),
    KernelCase("one module, one output", WHOLE, ((0,),)),
    KernelCase("four modules", QKVG, ((0, 1, 2, 3), (3,), (1, 2))),
    KernelCase("TP 2", QKVZ, ((0, 1), (1,)), size=2),
    KernelCase("TP 2, sharded", ODD, ((0, 1), (1,)), size=2, fully_sharded=True),
    KernelCase("TP 4, sharded: 2 rows of A per rank", QKVZ, size=4, fully_sharded=True),
    KernelCase(
        "TP 2, sharded, four modules", QKVG, ((0, 1, 2, 3), (3,)), size=2, fully_sharded=True
    ),
)
