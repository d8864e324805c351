"""A model class of plain torch whose ``load_weights`` does what vLLM's model classes do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vllm_nway_lora.rows.trace import Traced, trace_modules

ROWS, COLUMNS = 8, 4
Weights = Iterator[tuple[str, torch.Tensor]]


class Twin(nn.Module):
    """A model of rank 1 of 2: ``fused`` holds half of q's rows, then half of k's; ``down`` half the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.add(ROWS, COLUMNS, self.load_half_of_rows)
        self.down = self.add(ROWS, COLUMNS // 2, self.load_half_of_columns)
        self.copied = nn.Parameter(torch.empty(ROWS, COLUMNS, device="meta"), requires_grad=False)

    def add(self, rows: int, columns: int, loader: Callable[..., None]) -> Any:
        parameter: Any = nn.Parameter(
            torch.empty(rows, columns, device="meta"), requires_grad=False
        )
        parameter.weight_loader = loader
        return parameter

    @staticmethod
    def load_half_of_rows(parameter: Any, weight: torch.Tensor, shard: str) -> None:
        start = 4 if shard == "k" else 0
        parameter.data[start : start + 4] = weight.narrow(0, 4, 4)

    @staticmethod
    def load_half_of_columns(parameter: Any, weight: torch.Tensor) -> None:
        width = parameter.shape[1]
        parameter.data.copy_(weight.narrow(1, width, width))

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            self.load(name.removesuffix(".weight"), weight)

    def load(self, name: str, weight: torch.Tensor) -> None:
        if name in ("q", "k"):
            self.fused.weight_loader(self.fused, weight, name)
        elif name == "down":
            self.down.weight_loader(self.down, weight)
        elif name == "copied":
            self.copied.weight_loader(self.copied, weight)
        elif name != "skipped":
            raise ValueError(f"there is no module named {name}")


def trace(twin: nn.Module, *modules: str) -> dict[str, Traced]:
    return trace_modules(twin, dict.fromkeys(modules, (ROWS, COLUMNS)))


def rows(traced: Traced) -> list[list[int]]:
    return [place.rows.tolist() for place in traced.places]
