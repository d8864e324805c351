# SPDX-License-Identifier: Apache-2.0
"""The functions that add LoRA on ``kv_b_proj`` to one MLA attention layer.

A token is identified by its index in the batch of ``MLAAttention.forward_impl``: decode tokens come
first, then prefill tokens. The context of a prefill is multiplied in chunks; each row has the adapter of its
request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_nway_lora.layers.mla_products import HeadLoRA


class MLAError(RuntimeError):
    """vLLM's attention has called its functions in another way than this module knows."""


@dataclass
class _Batch:
    """One call of an attention layer whose batch may have LoRA on ``kv_b_proj``.

    Attributes:
        query: ``(tokens, heads, nope + rope)``; decodes come first.
        slots: ``(tokens,)``, each token's slot; -1 for none.
        decoded: the number of tokens that are decoded.
        lora: the LoRA tensors.
        context: the slots of the next chunks of context; None outside of them.
    """

    query: torch.Tensor
    slots: torch.Tensor
    decoded: int
    lora: HeadLoRA
    context: Iterator[torch.Tensor] | None = None


class CorrectedAttention:
    """The functions that replace those of one attention layer, its implementation and its LoRA layer."""

    def __init__(self, attention: Any, lora_layer: Any) -> None:
        implementation = attention.impl
        self._attention = attention
        self._lora_layer = lora_layer
        self._set_lora, self._reset_lora = lora_layer.set_lora, lora_layer.reset_lora
        self._forward_impl = attention.forward_impl
        self._v_up_proj = attention._v_up_proj
        self._forward_mqa = implementation.forward_mqa
        self._compute_context = implementation._compute_prefill_context
        self._used: set[int] = set()
        self._batch: _Batch | None = None

    def install(self) -> None:
        """Replace the functions, on these objects only."""
        attention, implementation = self._attention, self._attention.impl
        attention.forward_impl = self.forward_impl
        attention._v_up_proj = self.add_values
        implementation.forward_mqa = self.forward_mqa
        implementation._compute_prefill_context = self.compute_context
        implementation.kv_b_proj = CorrectedProjection(self._lora_layer, self)
        self._lora_layer.set_lora, self._lora_layer.reset_lora = self.set_lora, self.reset_lora

    def set_lora(self, index: int, *args: Any, **kwargs: Any) -> None:
        """Set a slot of the LoRA layer, and note whether it has LoRA."""
        self._set_lora(index, *args, **kwargs)
        if bool(self._lora_layer.lora_b_stacked[0][index].any()):  # not so in vLLM's warm-up
            self._used.add(index)

    def reset_lora(self, index: int) -> None:
        """Reset a slot of the LoRA layer."""
        self._used.discard(index)
        self._reset_lora(index)

    def forward_impl(
        self,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call ``MLAAttention.forward_impl``, with each token's slot known."""
        if self._used and attn_metadata is not None:  # None: vLLM measures its memory
            tokens = attn_metadata.num_actual_tokens
            self._batch = _Batch(
                q[:tokens], self._find_slots(tokens), attn_metadata.num_decode_tokens, self._lora
            )
        try:
            return self._forward_impl(q, k_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs)
        finally:
            self._batch = None

    @property
    def _lora(self) -> HeadLoRA:
        """The LoRA tensors, as views of the LoRA layer's."""
        attention = self._attention
        heads = (attention.num_heads, attention.qk_nope_head_dim + attention.v_head_dim)
        a, b = self._lora_layer.lora_a_stacked[0], self._lora_layer.lora_b_stacked[0]
        return HeadLoRA(
            a[:, 0], b[:, 0].unflatten(1, heads), attention.qk_nope_head_dim, sorted(self._used)
        )

    def _find_slots(self, tokens: int) -> torch.Tensor:
        """Return the slot of each token, ``(tokens,)``; -1 for none."""
        slots: torch.Tensor = self._lora_layer.punica_wrapper.token_lora_indices[:tokens]
        return nn.functional.pad(slots, (0, tokens - len(slots)), value=-1)

    def _find_batch(self) -> _Batch | None:
        """Return the current call; None if no adapter has LoRA on this layer.

        Raises:
            MLAError: the caller has gone around ``MLAAttention.forward_impl``.
        """
        if self._used and self._batch is None:
            raise MLAError(
                f"{self._attention.layer_name}: vLLM called its attention without forward_impl, so each "
                "token's adapter is unknown. Report this"
            )
        return self._batch

    def forward_mqa(self, q: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the implementation's ``forward_mqa`` with LoRA on K in the absorbed queries.

        Raises:
            MLAError: the queries are others than those that are decoded.
        """
        if batch := self._find_batch():
            if not isinstance(q, tuple) or len(q[0]) != batch.decoded:
                raise MLAError(f"{self._attention.layer_name}: its queries are not known here")
            query = batch.query[: batch.decoded, :, : batch.lora.nope]
            batch.lora.add_to_queries(q[0], query, batch.slots[: batch.decoded])
        return self._forward_mqa(q, *args, **kwargs)

    def add_values(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Call ``MLAAttention._v_up_proj`` and add LoRA on V to its output."""
        self._v_up_proj(x, out=out)
        if batch := self._find_batch():
            attention = self._attention
            latent = x.view(-1, attention.num_heads, attention.kv_lora_rank)
            values = out.view(-1, attention.num_heads, attention.v_head_dim)
            batch.lora.add_to_output(values, latent, batch.slots[: batch.decoded])

    def compute_context(
        self, q: Any, kv_c_and_k_pe_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the implementation's ``_compute_prefill_context``, with its chunks' slots known."""
        batch = self._find_batch()
        if batch:
            batch.context = list_context(batch.slots[batch.decoded :], attn_metadata.prefill)
        try:
            return self._compute_context(q, kv_c_and_k_pe_cache, attn_metadata, *args, **kwargs)
        finally:
            if batch:
                batch.context = None

    def add_to_prefill(self, output: torch.Tensor, latent: torch.Tensor) -> None:
        """Add LoRA to the keys and values of prefilled tokens or of the next chunk of context, in place.

        Raises:
            MLAError: the latent vectors are other ones.
        """
        if batch := self._find_batch():
            slots = batch.slots[batch.decoded :] if batch.context is None else next(batch.context)
            if len(slots) != len(latent):
                raise MLAError(f"{self._attention.layer_name}: its context is not known here")
            batch.lora.add_to_keys_and_values(output, latent, slots)


class CorrectedProjection:
    """What an implementation calls as its ``kv_b_proj``: the base layer, and LoRA on its output."""

    def __init__(self, lora_layer: Any, attention: CorrectedAttention) -> None:
        self._lora_layer = lora_layer
        self._corrected = attention

    def __call__(self, latent: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the keys and values of ``(tokens, latent)``, and the layer's bias."""
        output, bias = self._lora_layer.base_layer(latent)
        self._corrected.add_to_prefill(output, latent)
        return output, bias

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the base layer."""
        return getattr(object.__getattribute__(self, "_lora_layer").base_layer, name)


def list_context(slots: torch.Tensor, prefill: Any) -> Iterator[torch.Tensor]:
    """Yield the slots of each chunk of context, in vLLM's order.

    A chunk has a part of the context of some requests, request after request. The context has the adapter
    of its request.

    Args:
        slots: the slots of the tokens that are prefilled.
        prefill: vLLM's metadata of the prefill.
    """
    # A request of no tokens can be at the end.
    first = prefill.query_start_loc[:-1].clamp(max=len(slots) - 1)
    of_requests = slots[first.long()]
    for rows, starts, requests in _list_chunks(prefill.chunked_context):
        row = torch.arange(rows, device=slots.device)
        request = torch.bucketize(row, starts[1:].to(row.dtype), right=True)
        yield of_requests[requests][request]


def _list_chunks(context: Any) -> Iterator[tuple[int, torch.Tensor, slice]]:
    """Yield each chunk's rows, the first row of each of its requests, and these requests."""
    chunks = getattr(context, "chunks", None)
    if chunks is not None:
        for chunk in chunks:
            yield chunk.num_context_tokens, chunk.cu_seq_lens, chunk.request_slice
    else:  # older releases: every chunk has all requests
        for rows, starts in zip(context.seq_tot, context.cu_seq_lens, strict=True):
            yield rows, starts, slice(None)
