# SPDX-License-Identifier: Apache-2.0
"""LoRA products on CPU, grouped by adapter.

vLLM's CPU wrapper copies the adapter's whole A and B for every token and multiplies each copy by
one row. This module multiplies all tokens of an adapter by its A and B at once, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import linear


def group_by_adapter(punica_wrapper: Any) -> Any:
    """Return ``GroupedPunica`` around vLLM's CPU wrapper; return any other wrapper unchanged.

    Subclasses of vLLM's CPU wrapper belong to platforms outside vLLM and can compute the products
    in another way, so they are returned unchanged too.
    """
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    except ImportError:
        return punica_wrapper
    if type(punica_wrapper) is not PunicaWrapperCPU:
        return punica_wrapper
    return GroupedPunica(punica_wrapper)


class GroupedPunica:
    """The part of vLLM's punica wrapper that a column-parallel LoRA layer calls.

    Operands and dtypes are those of ``PunicaWrapperCPU``: A is applied in the buffers' float32, B in
    the output's dtype. This class rounds the sum once, vLLM rounds it twice. Tokens with index -1,
    and tokens after the end of the mapping (padding), stay unchanged.

    A call with an argument that is unknown here goes to vLLM: a later release may pass one.
    """

    def __init__(self, punica_wrapper: Any) -> None:
        self._wrapper = punica_wrapper

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of vLLM's wrapper."""
        return getattr(object.__getattribute__(self, "_wrapper"), name)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **unknown: Any,
    ) -> None:
        """Add every slice's LoRA to ``y``, in place.

        Args:
            y: base output, ``(tokens, local width)``.
            x: ``(tokens, input_size)``.
            lora_a_stacked: per slice ``(max_loras, 1, max_lora_rank, input_size)``.
            lora_b_stacked: per slice ``(max_loras, 1, width, max_lora_rank)``.
            scale: factor of the LoRA part.
            output_slices: width of each slice, in columns of ``y``.
        """
        if unknown:
            self._wrapper.add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **unknown
            )
            return
        shape = (len(lora_a_stacked), x.shape[0], lora_a_stacked[0].shape[2])
        buffers = torch.zeros(shape, dtype=torch.float32, device=x.device)
        self.add_shrink(buffers, x, lora_a_stacked, scale)
        self.add_expand(y, buffers, lora_b_stacked, output_slices)

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        scale: float,
        **unknown: Any,
    ) -> None:
        """Set ``y``, ``(slices, tokens, rows of A)``, to ``scale * x A^T`` per slice, in place."""
        if unknown:
            self._wrapper.add_shrink(y, x, lora_a_stacked, scale, **unknown)
            return
        indices = self._wrapper.token_lora_indices
        torch.ops.nway_lora.shrink(y, x, list(lora_a_stacked), indices, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_input: bool = True,  # vLLM's layers pass it, and its CPU wrapper ignores it
        **unknown: Any,
    ) -> None:
        """Add ``x B^T`` per slice to ``y``, in place; ``x`` is ``(slices, tokens, max_lora_rank)``.

        The slices are contiguous in ``y``'s columns and begin at ``offset_start``.
        """
        if unknown:
            self._wrapper.add_expand(y, x, lora_b_stacked, output_slices, offset_start, **unknown)
            return
        indices = self._wrapper.token_lora_indices
        widths = list(output_slices)
        torch.ops.nway_lora.expand(y, x, list(lora_b_stacked), indices, widths, offset_start)


def _groups(indices: torch.Tensor, tokens: int) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Yield each adapter's slot and its tokens: a slice if they are contiguous, else their indices.

    Raises:
        ValueError: the mapping has more tokens than the input.
    """
    if len(indices) > tokens:
        raise ValueError(f"LoRA's mapping has {len(indices)} tokens, the input has {tokens}")
    slots, counts = (t.tolist() for t in indices.unique_consecutive(return_counts=True))
    stops = list(accumulate(counts))
    for slot in sorted({*slots} - {-1}):
        if slots.count(slot) > 1:
            yield slot, (indices == slot).nonzero().flatten()
        else:
            run = slots.index(slot)
            yield slot, slice(stops[run] - counts[run], stops[run])


def _shrink(
    buffers: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    indices: torch.Tensor,
    scale: float,
) -> None:
    for slot, rows in _groups(indices, x.shape[0]):
        # Once per adapter, not once per slice.
        tokens = x[rows].to(buffers.dtype)
        for buffer, a in zip(buffers, lora_a, strict=True):
            buffer[rows] = scale * linear(tokens, a[slot, 0].to(buffers.dtype))


def _expand(
    y: torch.Tensor,
    buffers: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    indices: torch.Tensor,
    widths: Sequence[int],
    offset: int,
) -> None:
    for slot, rows in _groups(indices, y.shape[0]):
        start = offset
        for buffer, b, width in zip(buffers, lora_b, widths, strict=True):
            columns = y[:, start : start + width]
            shrunk, weight = buffer[rows].to(y.dtype), b[slot, 0].to(y.dtype).t()
            if isinstance(rows, slice):
                columns[rows].addmm_(shrunk, weight)
            else:
                columns.index_add_(0, rows, shrunk @ weight)
            start += width


# As operators, they are opaque to torch.compile. The adapters of a batch are known only when it
# runs; inlined, the products would be traced for the adapters of the first batch.
_library = torch.library.Library("nway_lora", "DEF")
_library.define(
    "shrink(Tensor(a!) buffers, Tensor x, Tensor[] lora_a, Tensor indices, float scale) -> ()"
)
_library.define(
    "expand(Tensor(a!) y, Tensor buffers, Tensor[] lora_b, Tensor indices, SymInt[] widths, "
    "SymInt offset) -> ()"
)
for _name, _function in (("shrink", _shrink), ("expand", _expand)):
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"nway_lora::{_name}", lambda *_: None, lib=_library)
