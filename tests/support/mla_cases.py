"""Batches for an MLA attention layer with LoRA on ``kv_b_proj``, and dense attention in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from support.mla_kernels import attend

HEADS, NOPE, ROPE, VALUE, LATENT = 4, 8, 4, 6, 16
SCALE = (NOPE + ROPE) ** -0.5
MAX_LORAS, MAX_RANK = 4, 8
#: Tokens of context per request in the cache, at most.
CACHE = 64


@dataclass(frozen=True)
class Request:
    """A request of a batch: its tokens in the cache, its new tokens, its slot (-1: no LoRA)."""

    context: int
    new: int
    slot: int


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        requests: those with one new token first, as in vLLM's batches.
        ranks: LoRA's r of each slot.
        dtype: of the model and of LoRA.
        workspace: rows of context that are gathered at once.
        masked: take the operations of a GPU.
        fully_sharded: ``--fully-sharded-loras``.
    """

    requests: tuple[Request, ...]
    ranks: tuple[int, ...] = (6, 8, 2)
    dtype: torch.dtype = torch.float32
    workspace: int = 32
    masked: bool = False
    fully_sharded: bool = False

    @property
    def decodes(self) -> int:
        """The number of requests that are decoded."""
        return sum(request.new == 1 for request in self.requests)

    @property
    def tokens(self) -> int:
        """The number of new tokens."""
        return sum(request.new for request in self.requests)


@dataclass(frozen=True)
class Tensors:
    """A case's tensors; the same on all ranks.

    Attributes:
        weight: ``(HEADS * (NOPE + VALUE), LATENT)``.
        adapters: per slot A and B.
        query: ``(tokens, HEADS, NOPE + ROPE)``.
        new: latent vectors and rotary keys of the new tokens, ``(tokens, LATENT + ROPE)``.
        cache: those of the context, and room for those of the new tokens, ``(requests, CACHE, ...)``.
    """

    weight: torch.Tensor
    adapters: list[tuple[torch.Tensor, torch.Tensor]]
    query: torch.Tensor
    new: torch.Tensor
    cache: torch.Tensor


def make_tensors(case: Case) -> Tensors:
    """Return the tensors of a case. The cache has the new tokens too, as when the attention runs."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    rows = HEADS * (NOPE + VALUE)
    tensors = Tensors(
        random(rows, LATENT),
        [(random(rank, LATENT), random(rows, rank)) for rank in case.ranks],
        random(case.tokens, HEADS, NOPE + ROPE),
        random(case.tokens, LATENT + ROPE),
        random(len(case.requests), CACHE, LATENT + ROPE),
    )
    news = tensors.new.split([request.new for request in case.requests])
    for number, (request, new) in enumerate(zip(case.requests, news, strict=True)):
        tensors.cache[number, request.context : request.context + request.new] = new
    return tensors


def compute_dense(case: Case, lora: bool = True) -> torch.Tensor:
    """Return the output of dense attention with merged weights, ``(tokens, HEADS * VALUE)``, in float64."""
    tensors = make_tensors(case)
    queries = tensors.query.double().split([request.new for request in case.requests])
    outputs = []
    for number, (request, query) in enumerate(zip(case.requests, queries, strict=True)):
        weight = tensors.weight.double()
        if lora and request.slot >= 0:
            a, b = tensors.adapters[request.slot]
            weight = weight + b.double() @ a.double()
        cached = tensors.cache[number, : request.context + request.new].double()
        latent, rotary = cached.split([LATENT, ROPE], dim=-1)
        key, value = (latent @ weight.T).unflatten(1, (HEADS, -1)).split([NOPE, VALUE], dim=-1)
        key = torch.cat([key, rotary[:, None].expand(-1, HEADS, -1)], dim=-1)
        outputs.append(attend(query, key, value, SCALE, causal=True)[0])
    return torch.cat(outputs).flatten(1)
