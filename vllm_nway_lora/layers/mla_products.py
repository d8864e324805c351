# SPDX-License-Identifier: Apache-2.0
"""LoRA of ``kv_b_proj`` in the three products in which MLA attention uses its weight.

Per head, the weight's rows are ``[K; V]``: ``nope`` rows for the keys, then ``value`` rows. A prefill
multiplies latent vectors by them. A decode multiplies queries by K and the attention's output by V^T,
so that LoRA is ``(q B_K) A`` on the queries and ``(o A^T) B_V^T`` on the output.

Only slots with LoRA on this layer are computed. On CPU, the tokens of each slot are selected and
multiplied. On a GPU, the mapping is in GPU memory, so every such slot multiplies all tokens, and
``torch.where`` selects the results. A product with a mask of zeros would pass on NaN and infinity of another
adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Tokens that are multiplied at once on a GPU; it bounds the memory of a long prefill.
_BLOCK = 1024

_Product = Callable[[int, slice | torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadLoRA:
    """The LoRA tensors of one ``kv_b_proj``, one adapter per slot.

    Attributes:
        a: ``(max_loras, rank, latent)``.
        b: ``(max_loras, heads, nope + value, rank)``, scaling folded in; the heads of this rank.
        nope: rows of a head's keys.
        used: the slots whose adapters have LoRA on this layer.
    """

    a: torch.Tensor
    b: torch.Tensor
    nope: int
    used: Sequence[int]

    def add_to_keys_and_values(
        self, y: torch.Tensor, latent: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Add LoRA to what ``kv_b_proj`` has made of latent vectors, in place.

        Args:
            y: ``(tokens, heads * (nope + value))``.
            latent: ``(tokens, latent)``.
            slots: ``(tokens,)``, each token's slot; -1 for none.
        """

        def product(slot: int, rows: slice | torch.Tensor) -> torch.Tensor:
            shrunk = latent[rows].to(y.dtype) @ self.a[slot].to(y.dtype).t()
            return shrunk @ self.b[slot].flatten(0, 1).to(y.dtype).t()

        _add(y, slots, self.used, product)

    def add_to_queries(self, y: torch.Tensor, query: torch.Tensor, slots: torch.Tensor) -> None:
        """Add LoRA to queries that K has been absorbed into, in place.

        Args:
            y: ``(tokens, heads, latent)``.
            query: ``(tokens, heads, nope)``.
            slots: as for :meth:`add_to_keys_and_values`.
        """

        def product(slot: int, rows: slice | torch.Tensor) -> torch.Tensor:
            keys = self.b[slot, :, : self.nope].to(y.dtype)
            shrunk = torch.bmm(query[rows].to(y.dtype).transpose(0, 1), keys)
            return (shrunk @ self.a[slot].to(y.dtype)).transpose(0, 1)

        _add(y, slots, self.used, product)

    def add_to_output(self, y: torch.Tensor, latent: torch.Tensor, slots: torch.Tensor) -> None:
        """Add LoRA to the values of an attention over latent vectors, in place.

        Args:
            y: ``(tokens, heads, value)``.
            latent: the attention's output, ``(tokens, heads, latent)``.
            slots: as for :meth:`add_to_keys_and_values`.
        """

        def product(slot: int, rows: slice | torch.Tensor) -> torch.Tensor:
            values = self.b[slot, :, self.nope :].to(y.dtype)
            shrunk = latent[rows].to(y.dtype).transpose(0, 1) @ self.a[slot].to(y.dtype).t()
            return torch.bmm(shrunk, values.transpose(1, 2)).transpose(0, 1)

        _add(y, slots, self.used, product)


def _add(y: torch.Tensor, slots: torch.Tensor, used: Sequence[int], product: _Product) -> None:
    """Add ``product(slot, tokens)`` to the tokens of each slot in ``used``, in place."""
    (_add_by_adapter if y.device.type == "cpu" else _add_masked)(y, slots, used, product)


def _add_by_adapter(
    y: torch.Tensor, slots: torch.Tensor, used: Sequence[int], product: _Product
) -> None:
    for slot in used:
        rows = (slots == slot).nonzero().flatten()
        if len(rows):
            y.index_add_(0, rows, product(slot, rows))


def _add_masked(
    y: torch.Tensor, slots: torch.Tensor, used: Sequence[int], product: _Product
) -> None:
    for start in range(0, len(y), _BLOCK):
        rows = slice(start, start + _BLOCK)
        part = y[rows]
        for slot in used:
            is_chosen = (slots[rows] == slot).view(-1, *[1] * (y.dim() - 1))
            part += torch.where(is_chosen, product(slot, rows), 0)
