# SPDX-License-Identifier: Apache-2.0
"""Check LoRA-A and LoRA-B of one module: one set of checks and messages for every layer.

Pure torch, no vLLM. Every function returns a phrase for a message, empty if there is no fault.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


def find_pair_fault(
    lora_a: torch.Tensor | None, lora_b: torch.Tensor | None, dims: Collection[int] = (2,)
) -> str:
    """Return the fault of a pair that no layer could apply.

    Args:
        lora_a: ``(r, columns)``, or None if the adapter has no LoRA-A for the module.
        lora_b: ``(rows, r)``, or None if the adapter has no LoRA-B for the module.
        dims: the numbers of dimensions that both may have; 3 for stacked experts.
    """
    if lora_a is None or lora_b is None:
        given, missing = ("B", "A") if lora_a is None else ("A", "B")
        return f"it has LoRA-{given} but no LoRA-{missing}"
    shapes = f"LoRA-A {tuple(lora_a.shape)} and LoRA-B {tuple(lora_b.shape)}"
    if lora_a.ndim != lora_b.ndim or lora_a.ndim not in dims:
        return f"expected two-dimensional tensors, found {shapes}"
    if lora_a.shape[-2] != lora_b.shape[-1]:
        return f"the ranks of {shapes} differ"
    return ""


def find_rank_fault(rank: int, max_rank: int) -> str:
    """Return the fault of a rank (LoRA's r) above the server's limit."""
    return f"its rank {rank} is above --max-lora-rank {max_rank}" if rank > max_rank else ""


def find_shape_fault(
    lora_a: torch.Tensor, lora_b: torch.Tensor, columns: int | None, rows: int | None
) -> str:
    """Return the fault of a sound pair that does not fit its module.

    Args:
        lora_a: ``(r, columns)``.
        lora_b: ``(rows, r)``.
        columns: the module's input size; None if unknown.
        rows: the module's rows over all tensor-parallel ranks; None if unknown.
    """
    if columns in (None, lora_a.shape[1]) and rows in (None, lora_b.shape[0]):
        return ""
    a_columns, b_rows = ("any" if size is None else size for size in (columns, rows))
    return (
        f"expected LoRA-A (r, {a_columns}) and LoRA-B ({b_rows}, r), "
        f"found {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
    )
