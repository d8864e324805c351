"""Experts with LoRA on CPU: the arithmetic of vLLM's Triton kernels in torch.

With LoRA, vLLM takes ``TritonExperts`` on every platform. Only the arithmetic is replaced; layers,
slots, slices and names stay vLLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu


def replace_kernels() -> None:
    """Replace the kernels in this process, before an engine is started."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(torch.device("cpu"))
    TritonExperts.apply = _apply
    softmax = functools.partial(torch.softmax, dim=-1)
    fused_topk_router.vllm_topk_softmax = functools.partial(_route, score=softmax)
    fused_topk_router.vllm_topk_sigmoid = functools.partial(_route, score=torch.sigmoid)


def _route(
    weights: torch.Tensor,
    ids: torch.Tensor,
    _: torch.Tensor,
    gate: torch.Tensor,
    renormalize: bool = False,
    *__: Any,
    score: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    best, chosen = score(gate.float()).topk(weights.shape[-1])
    weights.copy_(best / best.sum(-1, keepdim=True) if renormalize else best)
    ids.copy_(chosen)
    return weights, ids


def _apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    *_: Any,
    apply_router_weight_on_input: bool = False,
    **__: Any,
) -> None:
    from vllm.distributed import (
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )

    assert activation.value == "silu", activation
    context = self._lora_context
    tokens, ids = len(topk_ids), topk_ids.long()
    if expert_map is not None:  # expert parallel: -1 is an expert of another rank
        ids = expert_map.long()[ids]
        topk_weights = topk_weights.masked_fill(ids < 0, 0)
        ids = ids.clamp(min=0)
    slots = _slots(context, tokens)
    x = hidden_states.float()[:, None].expand(-1, ids.shape[1], -1)
    gate_up = torch.einsum("tkh,tkih->tki", x, w1[ids].float())
    down_lora = None
    if slots is not None:
        pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
        rank_is_split = context.fully_sharded and context.tp_size > 1
        gather = tensor_model_parallel_all_gather if rank_is_split else None
        gate_up += torch.cat([_product(x, a, b, slots, ids, gather) for a, b in pairs], -1)
        [down_lora] = zip(context.w2_lora_a_stacked, context.w2_lora_b_stacked, strict=True)
    gate_up = gate_up.to(hidden_states.dtype).float()
    gate, up = gate_up.chunk(2, -1)
    hidden = (silu(gate) * up).to(hidden_states.dtype).float()
    down = torch.einsum("tki,tkhi->tkh", hidden, w2[ids].float())
    if down_lora is not None:
        reduce = tensor_model_parallel_all_reduce if rank_is_split else None
        added = _product(hidden, *down_lora, slots, ids, reduce)
        # Fully sharded: this rank has its own rows of LoRA-B. The ranks' outputs are added afterwards.
        first = added.shape[-1] * context.tp_rank if rank_is_split else 0
        down[..., first : first + added.shape[-1]] += added
    scores = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    output.copy_((down * scores[..., None].float()).sum(1).to(output.dtype))


def _slots(context: Any, tokens: int) -> torch.Tensor | None:
    """Return each token's slot, -1 without LoRA on experts; None if no token has any."""
    if context is None:
        return None
    indices = context.punica_wrapper.token_lora_indices[:tokens].long()
    slots = torch.full((tokens,), -1)
    slots[: len(indices)] = indices
    slots = torch.where(context.adapter_enabled.bool()[slots.clamp(min=0)], slots, -1)
    return slots if bool((slots >= 0).any()) else None


def _product(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    ids: torch.Tensor,
    collect: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return B A x of each token's slot and experts; ``collect`` makes A x of the ranks' parts."""
    slot = slots.clamp(min=0)[:, None]
    # One tensor for all experts has one row there.
    a, b = (t[slot, ids.clamp(max=t.shape[1] - 1)].float() for t in (a, b))
    shrunk = torch.einsum("tkrh,tkh->tkr", a, x)
    y = torch.einsum("tkor,tkr->tko", b, collect(shrunk) if collect else shrunk)
    return torch.where((slots >= 0)[:, None, None], y, 0.0)
