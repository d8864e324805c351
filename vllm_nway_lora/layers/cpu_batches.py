# SPDX-License-Identifier: Apache-2.0
"""The tokens of a batch by adapter: computed once per step, used by every LoRA layer on CPU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

#: Up to this many rows, all adapters of a batch are multiplied in one batched product. It costs two
#: operators per slice in place of two per adapter and slice, but copies the rows and their output.
FEW = 64


@dataclass(frozen=True)
class FewTokens:
    """A batch of several adapters with few tokens, as one batched product.

    The tokens of each adapter are padded to the largest number of tokens of an adapter. A padding entry
    repeats a token, and its output is dropped.

    Attributes:
        adapters: number of adapters in use.
        slots: their slots: a slice if they are consecutive, else their indices.
        tokens: per entry, its token, adapter by adapter.
        places: per token with LoRA, its entry, in the order of the tokens.
        rows: the tokens with LoRA; None if every token has LoRA.
    """

    adapters: int
    slots: slice | torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """The tokens of a batch by adapter.

    Attributes:
        size: number of tokens in the mapping.
        groups: per adapter in use its slot and its tokens: a slice if they are consecutive, else their
            indices. A token without LoRA is in no group.
        is_uniform: whether the mapping has one adapter and no token without LoRA. Its slice is then
            of every row of an input, whatever the size of the mapping.
        few: the same as one batched product, if there are several adapters and few tokens.
    """

    size: int
    groups: tuple[tuple[int, slice | torch.Tensor], ...]
    is_uniform: bool = False
    few: FewTokens | None = None

    def fits(self, rows: int) -> bool:
        """Return whether it is known which adapter each of an input's rows has.

        Rows after the end of the mapping are padding.
        """
        return self.is_uniform or rows >= self.size or not self.groups

    def fits_exactly(self, rows: int) -> bool:
        """As :meth:`fits`, for an input without padding."""
        return self.is_uniform or rows == self.size or not self.groups


NO_LORA = Batch(0, ())


def group(indices: torch.Tensor) -> Batch:
    """Group tokens by adapter.

    Args:
        indices: int64 ``(tokens,)``: the slot of each token, -1 without LoRA.
    """
    slots, counts = (found.tolist() for found in indices.unique_consecutive(return_counts=True))
    used = sorted({*slots} - {-1})
    if len(slots) == 1 and used:
        return Batch(len(indices), ((used[0], slice(None)),), is_uniform=True)
    stops = list(accumulate(counts))
    groups: list[tuple[int, slice | torch.Tensor]] = []
    for slot in used:
        if slots.count(slot) > 1:
            groups.append((slot, (indices == slot).nonzero().flatten()))
        else:
            run = slots.index(slot)
            groups.append((slot, slice(stops[run] - counts[run], stops[run])))
    return Batch(len(indices), tuple(groups), few=_find_few(indices, used))


def _find_few(indices: torch.Tensor, used: list[int]) -> FewTokens | None:
    if len(used) < 2 or len(indices) > FEW:
        return None
    by_slot: dict[int, list[int]] = {slot: [] for slot in used}
    for token, slot in enumerate(indices.tolist()):
        if slot >= 0:
            by_slot[slot].append(token)
    most = max(map(len, by_slot.values()))
    if most * len(used) > FEW:
        return None
    tokens: list[int] = []
    place_of: dict[int, int] = {}
    for found in by_slot.values():
        place_of |= {token: len(tokens) + place for place, token in enumerate(found)}
        tokens += found + found[:1] * (most - len(found))
    rows = sorted(place_of)
    is_run = used[-1] - used[0] + 1 == len(used)
    return FewTokens(
        adapters=len(used),
        slots=slice(used[0], used[-1] + 1) if is_run else torch.tensor(used),
        tokens=torch.tensor(tokens),
        places=torch.tensor([place_of[token] for token in rows]),
        rows=None if len(rows) == len(indices) else torch.tensor(rows),
    )
