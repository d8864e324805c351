"""The kernels of Mamba 1 that vLLM lacks on CPU, in plain torch, and a count of the parts of batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import silu, softplus


def replace_kernels() -> None:
    """Replace vLLM's kernels in this process and in its forks."""
    from vllm.model_executor.layers.mamba import mamba_mixer

    mamba_mixer.selective_scan_fn = scan
    mamba_mixer.selective_state_update = update


def scan(
    u: torch.Tensor,
    states: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    z: torch.Tensor,
    bias: torch.Tensor,
    *,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    query_start_loc: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Return the gated output of a scan, ``(channels, tokens)``, and update the states of its requests.

    Args:
        u: input, ``(channels, tokens)``.
        states: all states, ``(blocks, channels, states)``.
        delta: time steps, as ``u``, before bias and softplus.
        a: ``(channels, states)``.
        b: ``(states, tokens)``.
        c: as ``b``.
        d: ``(channels,)``.
        z: gate, as ``u``.
        bias: ``(channels,)``.
        cache_indices: the block of each request.
        has_initial_state: whether a request has a state already.
        query_start_loc: the first token of each request, and the end of the last one.
    """
    output = torch.empty_like(u)
    steps = softplus(delta.float() + bias[:, None])
    ends = query_start_loc.tolist()
    for request, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
        block = states[cache_indices[request]]
        state = block.float() if has_initial_state[request] else torch.zeros_like(block)
        for token in range(first, end):
            step = steps[:, token, None]
            state = (step * a).exp() * state + step * b[:, token] * u[:, token, None]
            output[:, token] = (state * c[:, token]).sum(1) + d * u[:, token]
        block.copy_(state)
    return output * silu(z)


def update(
    states: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    bias: torch.Tensor,
    *,
    z: torch.Tensor,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    **_: Any,
) -> None:
    """Set ``out`` to the output of one step per request, ``(requests, channels)``, and update the states.

    Args as for :func:`scan`, transposed, except ``states`` and ``a``.
    """
    requests = torch.arange(len(x) + 1)
    output = scan(
        x.T,
        states,
        delta.T,
        a,
        b.T,
        c.T,
        d,
        z.T,
        bias,
        cache_indices=state_batch_indices.flatten(),
        has_initial_state=requests >= 0,
        query_start_loc=requests,
    )
    out.copy_(output.T)


def count_parts() -> Counter[str]:
    """Return a counter of the batches that mixers in this process prefill, decode, or both."""
    from vllm_nway_lora.layers import mixers

    counter: Counter[str] = Counter()
    list_parts = mixers._list_parts

    def list_and_count(prefix: str) -> Iterator[slice]:
        parts = list(list_parts(prefix))
        counter["mixed" if len(parts) == 2 else "others"] += 1
        return iter(parts)

    mixers._list_parts = list_and_count
    return counter
