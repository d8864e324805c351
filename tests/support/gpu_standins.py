"""vLLM's compiled operators of the base model in plain torch, for a GPU with vLLM's Python files only.

LoRA's own kernels are not here: they are vLLM's Triton kernels. The functions neither wait for the GPU
nor read a number of it, so that a CUDA graph can capture them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
_LIBRARIES: list[torch.library.Library] = []
#: Operators of the patterns that vLLM's compilation passes look for.
PATTERNS = (
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "fused_add_rms_norm_static_fp8_quant",
    "fused_qk_norm_rope",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_static_fp8_quant",
    "rotary_embedding",
    "silu_and_mul_per_block_quant",
    "silu_and_mul_quant",
    "static_scaled_fp8_quant",
)


def install() -> None:
    """Define the operators that vLLM finds no extension for, and turn off what cannot be replaced."""
    import vllm.utils.platform_utils  # noqa: F401

    # The second model runner reads pinned memory through a compiled function; without it, it copies.
    for module in list(sys.modules.values()):
        if "is_uva_available" in vars(module):
            vars(module)["is_uva_available"] = lambda: False
    operators: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {
        "_C": {
            "weak_ref_tensor": ("(Tensor(a) x) -> Tensor(a)", lambda x: x.detach()),
            "silu_and_mul": ("(Tensor! result, Tensor input) -> ()", silu_and_mul),
            "rms_norm": (
                "(Tensor! result, Tensor input, Tensor? weight, float eps) -> ()",
                rms_norm,
            ),
            "fused_add_rms_norm": (
                "(Tensor! input, Tensor! residual, Tensor? weight, float eps) -> ()",
                fused_add_rms_norm,
            ),
        },
        "_C_cuda_utils": {
            "get_max_shared_memory_per_block_device_attribute": (
                "(int? device) -> int",
                lambda device: torch.cuda.get_device_properties(
                    device
                ).shared_memory_per_block_optin,
            )
        },
        "_moe_C": {
            "topk_softmax": (
                "(Tensor! weights, Tensor! ids, Tensor! rows, Tensor gating, bool renormalize,"
                " Tensor? bias, Tensor? is_padding) -> ()",
                topk_softmax,
            ),
            "moe_sum": (
                "(Tensor input, Tensor! output, Tensor? ids=None, Tensor? map=None) -> ()",
                moe_sum,
            ),
            "moe_align_block_size": (
                "(Tensor ids, int experts, int block, Tensor! order, Tensor! blocks, Tensor! total,"
                " Tensor? map, Tensor? scatter) -> ()",
                moe_align_block_size,
            ),
            "moe_lora_align_block_size": (
                "(Tensor ids, Tensor slots, int experts, int block, int max_loras, int max_tokens,"
                " int max_blocks, Tensor! order, Tensor! blocks, Tensor! totals, Tensor enabled,"
                " Tensor lora_ids, Tensor? map) -> ()",
                moe_lora_align_block_size,
            ),
        },
    }
    # torch.compile's passes name these operators when they are imported; nothing here calls them.
    operators["_C"] |= dict.fromkeys(PATTERNS, ("(Tensor x) -> ()", _fail))
    for namespace, entries in operators.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        _LIBRARIES.append(library)
        for name, (schema, function) in entries.items():
            if not hasattr(getattr(torch.ops, namespace), name):
                library.define(name + schema)
                library.impl(name, function, "CompositeExplicitAutograd")


def _fail(x: Tensor) -> None:
    raise NotImplementedError("an operator of a fusion pass")


def silu_and_mul(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> None:
    out.copy_(_normalize(x, weight, eps))


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> None:
    residual.add_(x)
    x.copy_(_normalize(residual, weight, eps))


def _normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) if weight is None else wide.to(x.dtype) * weight


def topk_softmax(
    weights: Tensor,
    ids: Tensor,
    rows: Tensor,
    gating: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    scores = gating.float().softmax(-1)
    chosen = (scores if bias is None else scores + bias).topk(ids.shape[1], -1).indices
    found = scores.gather(-1, chosen)
    weights.copy_(found / found.sum(-1, keepdim=True) if renormalize else found)
    ids.copy_(chosen if is_padding is None else chosen.masked_fill(is_padding[:, None], -1))
    tokens = torch.arange(len(ids), device=ids.device)
    choices = torch.arange(ids.shape[1], device=ids.device)
    rows.copy_(choices * len(ids) + tokens[:, None])


def moe_sum(x: Tensor, out: Tensor, ids: Tensor | None = None, map: Tensor | None = None) -> None:
    if ids is not None:
        absent = ids < 0 if map is None else (ids < 0) | (map[ids.clamp(min=0).long()] < 0)
        x = x.masked_fill(absent.unsqueeze(-1), 0)
    out.copy_(x.sum(1))


def moe_align_block_size(
    ids: Tensor,
    experts: int,
    block: int,
    order: Tensor,
    blocks: Tensor,
    total: Tensor,
    map: Tensor | None,
    scatter: Tensor | None,
) -> None:
    if scatter is not None:
        raise NotImplementedError("moe_align_block_size with scatter_idx")
    _align(ids.flatten(), experts, block, order, blocks, total, map)


def moe_lora_align_block_size(
    ids: Tensor,
    slots: Tensor,
    experts: int,
    block: int,
    max_loras: int,
    max_tokens: int,
    max_blocks: int,
    order: Tensor,
    blocks: Tensor,
    totals: Tensor,
    enabled: Tensor,
    lora_ids: Tensor,
    map: Tensor | None,
) -> None:
    """Order the pairs of token and expert by expert, for each slot of an adapter on its own.

    The kernels read the part of each slot that has tokens.
    """
    for slot in range(max_loras):
        is_ours = (slots[: len(ids)] == slot) & (enabled[slot] != 0)
        _align(
            ids.masked_fill(~is_ours[:, None], -1).flatten(),
            experts,
            block,
            order[slot * max_tokens : (slot + 1) * max_tokens],
            blocks[slot * max_blocks : (slot + 1) * max_blocks],
            totals[slot : slot + 1],
            map,
        )


def _align(
    ids: Tensor,
    experts: int,
    block: int,
    order: Tensor,
    blocks: Tensor,
    total: Tensor,
    map: Tensor | None,
) -> None:
    """Write the order of ``ids`` by expert, each expert's part padded to whole blocks.

    Args:
        ids: an expert for each pair; a number outside of ``experts`` has no place.
        experts: the number of experts.
        block: the size of a block.
        order: receives the pairs' numbers; padding is their count.
        blocks: receives each block's expert; -1 after the last.
        total: receives the length of what is used of ``order``.
        map: expert -> its number on this rank.
    """
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts).long()
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    padded = (counts[:experts] + block - 1) // block * block
    ends = padded.cumsum(0)
    by_expert, pairs = ids.sort(stable=True)
    nth = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[by_expert]
    nowhere = torch.full((1,), len(order), device=ids.device)
    starts = torch.cat([ends - padded, nowhere])
    places = torch.where(by_expert < experts, starts[by_expert] + nth, len(order))
    found = torch.full((len(order) + 1,), len(ids), dtype=torch.long, device=ids.device)
    order.copy_(found.scatter_(0, places.clamp(max=len(order)), pairs)[:-1])
    firsts = torch.arange(len(blocks), device=ids.device) * block
    owner = torch.searchsorted(ends, firsts, right=True)
    local = owner.clamp(max=experts - 1)
    local = local if map is None else map[local].long()
    blocks.copy_(torch.where(owner < experts, local, -1))
    total.copy_(ends[-1:])
