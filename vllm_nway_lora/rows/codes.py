# SPDX-License-Identifier: Apache-2.0
"""Numbers for rows and columns, which are recognised after a model has moved them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping

import torch

from vllm_nway_lora.rows.recorder import TraceError

#: The numbers of one load lie between 2**23 and 2**24, and their mean distance is at least two.
MAX_NUMBERS = 2**22


class ChangedError(TraceError):
    """A weight whose values the model changes while it loads them."""


class Codes:
    """Numbers for the rows, or the columns, of some modules: distinct integers below 2**24 in no order.

    float32 holds them exactly. They are spread at random, so that the sums, means and multiples of
    some of them are not all numbers too.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        total = sum(sizes.values())
        if total > MAX_NUMBERS:
            raise TraceError(f"{total} rows or columns are more than can be numbered")
        generator = torch.Generator().manual_seed(total)
        gaps = torch.randint(1, 2 * (MAX_NUMBERS // max(1, total)), (total,), generator=generator)
        self._sorted = 2**23 + gaps.cumsum(0)
        self._order = torch.randperm(total, generator=generator)
        self._place = torch.empty_like(self._order)
        self._place[self._order] = torch.arange(total)
        self._sizes = dict(sizes)
        self._starts = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))

    def of(self, name: str) -> torch.Tensor:
        """Return a module's numbers, float32, shape ``(size,)``."""
        start = self._starts[name]
        return self._sorted[self._place[start : start + self._sizes[name]]].float()

    def locate(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return at each of ``numbers`` the module, by its place in ``sizes``, and the module's index.

        Both are int64, of the shape of ``numbers``, and -1 where there is none.

        Raises:
            TraceError: a number above 0 is none of these.
        """
        numbers = numbers.double()
        at = torch.searchsorted(self._sorted, numbers.long()).clamp(max=len(self._sorted) - 1)
        is_code = self._sorted[at].double() == numbers
        if not bool((is_code | (numbers <= 0)).all()):
            if torch.equal(numbers, numbers.bfloat16().double()):
                raise TraceError("the model loads it in a type too narrow for the numbers")
            raise ChangedError("the model changes its values while it loads them")
        index = torch.where(is_code, self._order[at], -1)
        starts = torch.tensor(list(self._starts.values()))
        owner = torch.searchsorted(starts, index, right=True) - 1  # -1 below all of them
        return owner, torch.where(owner >= 0, index - starts[owner], -1)

    def decode(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return per module its index at each of ``numbers``, -1 where there is another or none.

        Raises:
            TraceError: as for :meth:`locate`.
        """
        owner, index = self.locate(numbers)
        names = list(self._starts)
        return {
            names[number]: torch.where(owner == number, index, -1)
            for number in owner.unique().tolist()
            if number >= 0
        }

    def owners(self, loaded: torch.Tensor) -> list[str]:
        """Return the modules of which ``loaded`` has numbers; none if it has others too."""
        with contextlib.suppress(Exception):
            return list(self.decode(loaded[:, 0])) or list(self.decode(loaded[0]))
        return []
