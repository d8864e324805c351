# SPDX-License-Identifier: Apache-2.0
"""What a layer's weight holds of a module, joined from the places of the module's trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nway_lora.rows.recorder import TraceError
from vllm_nway_lora.rows.trace import Traced


@dataclass(frozen=True, eq=False)
class Held:
    """What one layer's weight holds of one module on this rank.

    Attributes:
        size: the module's rows over all ranks.
        rows: int64, shape ``(local rows,)``: the module's row in each row, -1 where none is.
        columns: int64, shape ``(local columns,)``: the module's column in each column, or -1.
    """

    size: int
    rows: torch.Tensor
    columns: torch.Tensor


def gather(traced: Traced, parameter: str, size: int) -> Held:
    """Join the places of one module of ``size`` rows in the weight of its layer.

    Raises:
        TraceError: the module lands elsewhere too, or twice in the same rows.
    """
    others = sorted(set(traced.paths) - {parameter})
    if others:
        raise TraceError(f"its weight is loaded into {', '.join(others)} too")
    first, *more = traced.places
    rows = first.rows.clone()
    for place in more:
        if bool(((rows >= 0) & (place.rows >= 0)).any()):
            raise TraceError("its weight is loaded into the same rows twice")
        if not torch.equal(place.columns, first.columns):
            raise TraceError("its columns are loaded in different ways")
        rows = torch.where(place.rows >= 0, place.rows, rows)
    return Held(size, rows, first.columns)
