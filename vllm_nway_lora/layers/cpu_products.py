# SPDX-License-Identifier: Apache-2.0
"""LoRA products on CPU: all tokens of an adapter are multiplied by its A and B at once.

Every function takes a :class:`~vllm_nway_lora.layers.cpu_batches.Batch` that fits its rows. Sums are
float32, as in vLLM. The product with A is rounded to the output's dtype at most once, as in vLLM. The
product with B is rounded once; vLLM rounds it twice. Tokens without LoRA stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from vllm_nway_lora.layers.cpu_batches import Batch, FewTokens, group

#: Up to this many multiply-adds, a product of float32 takes less time on CPU than one of bfloat16, the
#: conversion of the weights included: PyTorch prepares every bfloat16 product for 13 microseconds.
SMALL = 2**19


class Slice(NamedTuple):
    """One slice of a layer, with views made once: making a view takes about a microsecond.

    Attributes:
        a: ``(max_loras, max_lora_rank, input_size)``.
        b: ``(max_loras, width, max_lora_rank)``.
        a_slots: per slot its matrix of ``a``.
        b_slots: per slot its matrix of ``b``.
        columns: the slice's columns in the layer's output.
        a_size: numbers in a matrix of ``a``.
        b_size: numbers in a matrix of ``b``.
    """

    a: torch.Tensor
    b: torch.Tensor
    a_slots: Sequence[torch.Tensor]
    b_slots: Sequence[torch.Tensor]
    columns: slice
    a_size: int
    b_size: int


def prepare(
    lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor], widths: Sequence[int]
) -> tuple[Slice, ...]:
    """Return the slices of a layer, without a copy.

    Args:
        lora_a: per slice ``(max_loras, 1, max_lora_rank, input_size)``.
        lora_b: per slice ``(max_loras, 1, width, max_lora_rank)``.
        widths: width of each slice, in columns of the output. The slices begin at column 0.
    """
    slices = []
    stops = accumulate(widths)
    for stacked_a, stacked_b, width, stop in zip(lora_a, lora_b, widths, stops, strict=True):
        a, b = stacked_a[:, 0], stacked_b[:, 0]
        columns = slice(stop - width, stop)
        slices.append(Slice(a, b, a.unbind(), b.unbind(), columns, a[0].numel(), b[0].numel()))
    return tuple(slices)


def add(
    y: torch.Tensor, x: torch.Tensor, slices: Sequence[Slice], scale: float, batch: Batch
) -> None:
    """Add every slice's ``scale * x A^T B^T`` to ``y``, in place.

    Args:
        y: base output, ``(tokens, local width)``.
        x: ``(tokens, input_size)``.
        slices: the layer's slices.
        scale: factor of the LoRA part.
        batch: the tokens by adapter.
    """
    is_native = x.dtype is torch.bfloat16 and slices[0].a.dtype is y.dtype is x.dtype
    is_whole = len(slices) == 1 and slices[0].columns == slice(0, y.shape[1])
    if batch.few is not None:
        _add_few(y, x, slices, scale, batch.few, is_native)
        return
    for slot, rows in batch.groups:
        tokens = x if batch.is_uniform else x[rows]
        count = tokens.shape[0]
        # Sums of A's bfloat16 product are float32, and then rounded as B's product requires.
        dtype = _choose(is_native, count * slices[0].a_size)
        tokens = tokens.to(dtype)
        for part in slices:
            h = linear(tokens, part.a_slots[slot].to(dtype))
            if scale != 1:
                h *= scale
            target = y if is_whole else y[:, part.columns]
            _expand_group(target, h, part.b_slots[slot], None if batch.is_uniform else rows)


def _add_few(
    y: torch.Tensor,
    x: torch.Tensor,
    slices: Sequence[Slice],
    scale: float,
    few: FewTokens,
    is_native: bool,
) -> None:
    dtype = _choose(is_native, len(few.tokens) * slices[0].a_size)
    tokens = _gather(x, few).to(dtype)
    for part in slices:
        h = torch.bmm(tokens, part.a[few.slots].to(dtype).transpose(1, 2))
        if scale != 1:
            h *= scale
        _expand_few(y[:, part.columns], h, part.b, few)


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
            _expand_few(columns, _gather(buffer, batch.few), b[:, 0], batch.few)
            continue
        for slot, rows in batch.groups:
            _expand_group(columns, buffer[rows], b[slot, 0], rows)


def _columns(y: torch.Tensor, widths: Sequence[int], offset: int) -> Iterable[torch.Tensor]:
    for width, stop in zip(widths, accumulate(widths), strict=True):
        yield y[:, offset + stop - width : offset + stop]


def _choose(is_native: bool, multiply_adds: int) -> torch.dtype:
    """Return the dtype of a product, in which its sums are float32."""
    return torch.bfloat16 if is_native and multiply_adds > SMALL else torch.float32


def _gather(x: torch.Tensor, few: FewTokens) -> torch.Tensor:
    """Return the row of each place, ``(adapters, places per adapter, columns)``."""
    return x.index_select(0, few.tokens).view(few.adapters, -1, x.shape[1])


def _expand_few(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, few: FewTokens) -> None:
    dtype = _choose(y.dtype is torch.bfloat16, len(few.tokens) * b[0].numel())
    product = torch.bmm(h.to(dtype), b[few.slots].to(dtype).transpose(1, 2))
    product = product.flatten(0, 1).index_select(0, few.places)
    if few.rows is None:
        y[: len(product)].add_(product)  # the rest is padding
    else:
        y.index_add_(0, few.rows, product.to(y.dtype))


def _expand_group(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, rows: slice | torch.Tensor | None
) -> None:
    """Add one adapter's ``h B^T`` to ``rows`` of ``y``; None is every row."""
    dtype = _choose(y.dtype is torch.bfloat16, h.shape[0] * b.numel())
    h, weight = h.to(dtype), b.to(dtype)
    if isinstance(rows, torch.Tensor):
        y.index_add_(0, rows, linear(h, weight).to(y.dtype))
        return
    y = y if rows is None else y[rows]
    if dtype is y.dtype:
        y.addmm_(h, weight.t())
    else:
        y.add_(linear(h, weight))


def _add_traced(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
    indices: torch.Tensor,
) -> None:
    add(y, x, prepare(lora_a, lora_b, widths), scale, _group(indices, len(x)))


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
