"""What vLLM's MLA attention calls of kernels, in plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of one request, ``(tokens, heads, value)``, and its lse, ``(heads, tokens)``.

    With ``causal``, the queries are those of the last keys.
    """
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    if query.dtype == torch.float64:
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
        scores = scores.masked_fill(mask, -torch.inf)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.to(scores.dtype))
    return output.to(value.dtype), scores.logsumexp(-1)


def build_implementation(
    base: Any, heads: int, sizes: tuple[int, int, int, int], scale: float
) -> Any:
    """Build an implementation with vLLM's common functions and a decode in torch."""
    from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl

    nope, rope, value, latent = sizes

    class Implementation(MLACommonImpl[Any]):
        is_sparse = False
        kernels: Any

        def __init__(self) -> None:
            self.num_heads, self.scale, self.kv_cache_dtype = heads, scale, "auto"
            self.qk_nope_head_dim, self.qk_rope_head_dim = nope, rope
            self.v_head_dim, self.kv_lora_rank = value, latent
            self.kv_b_proj = base
            self.dcp_world_size = 1
            self._pad_v = self._use_flashinfer_concat_mla_k = False
            self.supports_quant_query_input = False

        def forward_mqa(
            self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
        ) -> tuple[torch.Tensor, None]:
            outputs = []
            for number, query in enumerate(torch.cat(q, dim=-1)):
                request = self.kernels.requests[number]
                cached = kv_c_and_k_pe_cache[number, : request.context + 1]
                key = cached[:, None].expand(-1, heads, -1)
                outputs.append(attend(query[None], key, key[..., :latent], scale, causal=False)[0])
            return torch.cat(outputs), None

    return Implementation()


class Kernels:
    """The kernels of one batch; it is the prefill backend of the releases that have one."""

    def __init__(self, implementation: Any, requests: Sequence[Any]) -> None:
        from vllm.model_executor.layers.attention import mla_attention

        self._module = mla_attention
        self._implementation = implementation
        self.requests = requests
        self._starts = torch.empty(0)
        self._context_starts = torch.empty(0)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace vLLM's kernels."""
        self._implementation.kernels = self
        for name in ("new_tokens", "context_chunk"):  # until there were prefill backends
            setattr(
                self._implementation, f"_run_prefill_{name}", getattr(self, f"run_prefill_{name}")
            )
        ops = SimpleNamespace(
            gather_and_maybe_dequant_cache=gather, gather_mla_context_cache_cpu=gather
        )
        with (
            mock.patch.object(self._module, "ops", ops),
            mock.patch.object(self._module, "merge_attn_states", merge),
        ):
            yield

    def plan_context(
        self, contexts: torch.Tensor, starts: torch.Tensor, workspace: int, width: int
    ) -> Any:
        """Return vLLM's plan for the context of the prefilled requests; None without context."""
        self._starts = starts
        if not contexts.any():
            return None
        rows = torch.empty(workspace, width)
        build = getattr(self._module, "build_mla_chunked_context_metadata", None)
        if build is not None:
            return build(
                context_lens_cpu=contexts,
                prefill_query_start_loc_cpu=starts,
                chunked_prefill_workspace=rows,
                chunked_prefill_workspace_size=workspace,
                block_size=4,
                align_chunk_to_block=True,
                device=torch.device("cpu"),
                dcp_world_size=1,
                dcp_local_block_size=1,
                dcp_virtual_block_size=1,
            )
        size = max(workspace // len(contexts) // 4 * 4, 4)
        firsts = torch.arange(0, int(contexts.max()), size)[:, None].int().expand(-1, len(contexts))
        lengths = (contexts - firsts).clamp(0, size)
        cumulated = torch.nn.functional.pad(lengths.cumsum(1).int(), (1, 0))
        self._context_starts = cumulated
        totals = lengths.sum(1).tolist()
        return SimpleNamespace(
            cu_seq_lens=cumulated,
            starts=firsts,
            seq_tot=totals,
            chunk_total_token=totals,
            token_to_seq=cumulated,
            workspace=torch.empty(max(totals), width),
            prefill_tokens_with_context=None,
        )

    def run_prefill_new_tokens(
        self, q: Any, k: Any, v: Any, return_softmax_lse: bool, **_: Any
    ) -> Any:
        """Return the attention among the new tokens."""
        output, lse = self._attend(q, k, v, self._starts, self._starts, causal=True)
        return (output, lse) if return_softmax_lse else output

    def run_prefill_context_chunk(
        self, q: Any, k: Any, v: Any, chunk: Any = None, chunk_idx: int = 0, prefill: Any = None
    ) -> Any:
        """Return the attention to one chunk of context."""
        if chunk is not None:
            return self._attend(q, k, v, chunk.query_start_loc, chunk.cu_seq_lens, causal=False)
        return self._attend(q, k, v, self._starts, self._context_starts[chunk_idx], False)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            attend(q[a:b], k[c:d], v[c:d], self._implementation.scale, causal)
            for a, b, c, d in zip(
                *(t.tolist() for t in (queries[:-1], queries[1:], keys[:-1], keys[1:])), strict=True
            )
        ]
        return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def gather(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    starts: torch.Tensor | None = None,
    seq_starts: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Copy the context of some requests to ``dst``, request after request; one block per request."""
    firsts = seq_starts if starts is None else starts
    assert firsts is not None
    bounds = cu_seq_lens.tolist()
    for number, (first, block) in enumerate(
        zip(firsts.tolist(), block_table[:, 0].tolist(), strict=True)
    ):
        rows = bounds[number + 1] - bounds[number]
        dst[bounds[number] : bounds[number + 1]] = src_cache[block, first : first + rows]


def merge(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Merge two parts of an attention by their lse."""
    total = torch.logaddexp(prefix_lse, suffix_lse)
    parts = [
        (lse - total).exp().nan_to_num(0).t()[..., None] * part.float().nan_to_num(0)
        for part, lse in ((prefix_output, prefix_lse), (suffix_output, suffix_lse))
    ]
    output.copy_(sum(parts, torch.zeros(())))
    if output_lse is not None:
        output_lse.copy_(total)
