# SPDX-License-Identifier: Apache-2.0
"""LoRA products on CPU: all tokens of an adapter are multiplied by its A and B at once.

Every function takes a :class:`~vllm_nway_lora.layers.cpu_batches.Batch` that fits its rows. Operands
and dtypes are those of vLLM's products: the sums of A are float32, B is multiplied in the output's
dtype. The sum is rounded once, vLLM rounds it twice. Tokens without LoRA stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.functional import linear

from vllm_nway_lora.layers.cpu_batches import Batch, FewTokens, group


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
    batch: Batch,
) -> None:
    """Add every slice's ``scale * x A^T B^T`` to ``y``, in place.

    Args:
        y: base output, ``(tokens, local width)``.
        x: ``(tokens, input_size)``.
        lora_a: per slice ``(max_loras, 1, max_lora_rank, input_size)``.
        lora_b: per slice ``(max_loras, 1, width, max_lora_rank)``.
        scale: factor of the LoRA part.
        widths: width of each slice, in columns of ``y``. The slices begin at column 0.
        batch: the tokens by adapter.
    """
    # A product of bfloat16 has sums in float32, and is rounded to bfloat16 as B's product requires.
    is_native = x.dtype == lora_a[0].dtype == y.dtype and x.dtype is torch.bfloat16
    dtype = x.dtype if is_native else torch.float32
    slices = list(zip(lora_a, lora_b, _columns(y, widths, 0), strict=True))
    if batch.few is not None:
        few = batch.few
        tokens = _gather(x, few).to(dtype)
        for a, b, columns in slices:
            h = _scale(torch.bmm(tokens, a[few.slots, 0].to(dtype).transpose(1, 2)), scale)
            _expand_few(columns, h, b, few)
        return
    for slot, rows in batch.groups:
        tokens = (x if batch.is_uniform else x[rows]).to(dtype)
        for a, b, columns in slices:
            h = _scale(linear(tokens, a[slot, 0].to(dtype)), scale)
            _expand_group(columns, h, b[slot, 0], rows)


def shrink(
    buffers: Sequence[torch.Tensor] | torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    scale: float,
    batch: Batch,
) -> None:
    """Set ``buffers``, per slice ``(tokens, rows of A)``, to ``scale * x A^T``, in place."""
    for slot, rows in batch.groups:
        tokens = x[rows].to(buffers[0].dtype)
        for buffer, a in zip(buffers, lora_a, strict=True):
            # A buffer can be wider than A, as in vLLM.
            buffer[rows, : a.shape[-2]] = scale * linear(tokens, a[slot, 0].to(buffer.dtype))


def expand(
    y: torch.Tensor,
    buffers: Sequence[torch.Tensor] | torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    widths: Sequence[int],
    offset: int,
    batch: Batch,
) -> None:
    """Add ``buffers B^T`` per slice to ``y``, in place.

    The slices are consecutive in ``y``'s columns and begin at ``offset``.
    """
    for buffer, b, columns in zip(buffers, lora_b, _columns(y, widths, offset), strict=True):
        if batch.few is not None:
            _expand_few(columns, _gather(buffer, batch.few), b, batch.few)
            continue
        for slot, rows in batch.groups:
            _expand_group(columns, buffer[rows], b[slot, 0], rows)


def _columns(y: torch.Tensor, widths: Sequence[int], offset: int) -> Iterable[torch.Tensor]:
    if offset == 0 and len(widths) == 1 and widths[0] == y.shape[1]:
        return (y,)
    starts = [offset + sum(widths[:number]) for number in range(len(widths))]
    return [y[:, start : start + width] for start, width in zip(starts, widths, strict=True)]


def _scale(h: torch.Tensor, scale: float) -> torch.Tensor:
    return h if scale == 1 else h * scale


def _gather(x: torch.Tensor, few: FewTokens) -> torch.Tensor:
    """Return the row of each place, ``(adapters, places per adapter, columns)``."""
    return x.index_select(0, few.tokens).view(few.adapters, -1, x.shape[1])


def _expand_few(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, few: FewTokens) -> None:
    weights = b[few.slots, 0].to(y.dtype).transpose(1, 2)
    product = torch.bmm(h.to(y.dtype), weights).flatten(0, 1).index_select(0, few.places)
    if few.rows is None:
        y[: len(product)].add_(product)  # the rest is padding
    else:
        y.index_add_(0, few.rows, product)


def _expand_group(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, rows: slice | torch.Tensor
) -> None:
    h, weight = h.to(y.dtype), b.to(y.dtype).t()
    if isinstance(rows, slice):
        y[rows].addmm_(h, weight)
    else:
        y.index_add_(0, rows, h @ weight)


def _add_traced(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
    indices: torch.Tensor,
) -> None:
    add(y, x, lora_a, lora_b, scale, widths, _group(indices, len(x)))


def _shrink_traced(
    buffers: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    scale: float,
    indices: torch.Tensor,
) -> None:
    shrink(buffers, x, lora_a, scale, _group(indices, len(x)))


def _expand_traced(
    y: torch.Tensor,
    buffers: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    widths: Sequence[int],
    offset: int,
    indices: torch.Tensor,
) -> None:
    expand(y, buffers, lora_b, widths, offset, _group(indices, len(y)))


def _group(indices: torch.Tensor, rows: int) -> Batch:
    """Group the tokens of a compiled layer.

    Raises:
        ValueError: the mapping has more tokens than the input, and several adapters.
    """
    batch = group(indices)
    if not batch.fits(rows):
        raise ValueError(f"LoRA's mapping has {batch.size} tokens, the input has {rows}")
    return batch


# For torch.compile, the products are operators that it does not look into. The adapters of a batch are
# known only when it runs; inlined, the products would be traced for the adapters of the first batch.
# Without torch.compile the functions are called directly: an operator of Python costs microseconds.
_library = torch.library.Library("nway_lora", "DEF")
for _schema, _function in (
    (
        "add(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, float scale, SymInt[] widths, "
        "Tensor indices) -> ()",
        _add_traced,
    ),
    (
        "shrink(Tensor(a!) buffers, Tensor x, Tensor[] lora_a, float scale, Tensor indices) -> ()",
        _shrink_traced,
    ),
    (
        "expand(Tensor(a!) y, Tensor buffers, Tensor[] lora_b, SymInt[] widths, SymInt offset, "
        "Tensor indices) -> ()",
        _expand_traced,
    ),
):
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"nway_lora::{_name}", lambda *_: None, lib=_library)
