# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what only a running server has: its process group, its limits for images."""

from __future__ import annotations

from typing import Any

import torch


class StandInGroup:
    """The part of a tensor-parallel group that layers use, for one simulated rank.

    Attributes:
        sent: the tensors that the rank has passed to gathers.
        replies: the results of its next gathers. If empty, a gather returns the rank's own part for
            every rank.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group = self.rank = self.local_rank = rank
        self.world_size = size
        self.ranks = list(range(size))
        self.unique_name = f"stand-in:{rank}"
        self.cpu_group = self.device_group = self.device_communicator = None
        self.sent: list[torch.Tensor] = []
        self.replies: list[torch.Tensor] = []

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return the next reply, or a tensor of its shape."""
        self.sent.append(x.clone())
        return self.replies.pop(0) if self.replies else torch.cat([x] * self.world_size, dim)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``: row-parallel layers are not examined."""
        return x


class StandInBudget:
    """The part of vLLM's ``MultiModalBudget`` that LoRA uses: a server's limits of tokens per image, which only a processor of images knows."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.mm_max_items_per_prompt = {"image": 1}
        self.mm_max_toks_per_item = {"image": 64}

    def get_encoder_budget(self) -> int:
        """Return a number of tokens: it sizes the workspace of LoRA, which nothing uses here."""
        return 64
