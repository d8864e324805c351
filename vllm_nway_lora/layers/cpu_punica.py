# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU wrapper for LoRA, with products grouped by adapter.

vLLM's own products copy the adapter's whole A and B for every token and multiply each copy by one row.
Until 0.32.0 they also apply the last slot to tokens without LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_nway_lora.layers import cpu_products
from vllm_nway_lora.layers.cpu_batches import NO_LORA, Batch, group
from vllm_nway_lora.layers.cpu_products import Slice


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """``PunicaWrapperCPU`` whose products multiply all tokens of an adapter at once.

    A subclass, not a proxy: torch.compile looks through a ``wrapt.ObjectProxy`` and would trace the
    products of vLLM. What this class does not compute goes to vLLM: a call with an argument that is
    unknown here, and a mapping that does not say which adapter each row of the input has.
    """

    _grouped_tokens: Batch = NO_LORA
    _grouped_prompts: Batch = NO_LORA
    _kept_slices: dict[int, tuple[Any, Any, tuple[Slice, ...]]]

    @classmethod
    def take_over(cls, punica_wrapper: PunicaWrapperCPU) -> GroupedPunicaWrapper:
        """Return a wrapper with the state of vLLM's."""
        grouped = cls.__new__(cls)
        grouped.__dict__.update(punica_wrapper.__dict__)
        grouped._kept_slices = {}
        return grouped

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Set the slot of each token and of each prompt, and group them by adapter."""
        super().update_metadata(*args, **kwargs)
        self._grouped_tokens = group(self.token_lora_indices)
        self._grouped_prompts = group(self.sampler_indices)

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
        """Add every slice's LoRA to ``y`` ``(..., local width)``, in place.

        ``x`` is ``(..., input_size)``; see :func:`~vllm_nway_lora.layers.cpu_products.add`.
        """
        if not unknown and torch.compiler.is_compiling():
            torch.ops.nway_lora.add(
                _flatten(y),
                _flatten(x),
                list(lora_a_stacked),
                list(lora_b_stacked),
                scale,
                list(output_slices),
                self.token_lora_indices,
            )
        elif unknown or not self._grouped_tokens.fits(_count_rows(x)):
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **unknown
            )
        elif self._grouped_tokens.groups:
            cpu_products.add(
                _flatten(y),
                _flatten(x),
                self._find_slices(lora_a_stacked, lora_b_stacked, output_slices),
                scale,
                self._grouped_tokens,
            )

    def add_shrink(
        self,
        y: Sequence[torch.Tensor] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        scale: float,
        **unknown: Any,
    ) -> None:
        """Set ``y``, per slice ``(tokens, rows of A)``, to ``scale * x A^T``, in place."""
        is_known = not unknown and isinstance(y, torch.Tensor)
        if is_known and torch.compiler.is_compiling():
            torch.ops.nway_lora.shrink(
                y, _flatten(x), list(lora_a_stacked), scale, self.token_lora_indices
            )
        elif not is_known or not self._grouped_tokens.fits(_count_rows(x)):
            super().add_shrink(y, x, lora_a_stacked, scale, **unknown)
        else:
            cpu_products.shrink(y, _flatten(x), lora_a_stacked, scale, self._grouped_tokens)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor] | torch.Tensor,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        add_input: bool = True,  # vLLM's layers pass this name; its CPU wrapper ignores it
        **unknown: Any,
    ) -> None:
        """Add ``x B^T`` per slice to ``y``, in place; ``x`` is ``(slices, tokens, max_lora_rank)``.

        The slices are consecutive in ``y``'s columns and begin at ``offset_start``.
        """
        is_known = not unknown and add_inputs and isinstance(x, torch.Tensor)
        if is_known and torch.compiler.is_compiling():
            torch.ops.nway_lora.expand(
                _flatten(y),
                x,
                list(lora_b_stacked),
                list(output_slices),
                offset_start,
                self.token_lora_indices,
            )
        elif not is_known or not self._grouped_tokens.fits(_count_rows(y)):
            super().add_expand(
                y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **unknown
            )
        else:
            cpu_products.expand(
                _flatten(y), x, lora_b_stacked, output_slices, offset_start, self._grouped_tokens
            )

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        add_input: bool = True,  # as in `add_expand`
        **unknown: Any,
    ) -> None:
        """Add ``x B^T`` to ``y``, in place.

        Args:
            y: base output, ``(tokens, embedding_dim)``.
            x: the tokens' rows of A, ``(tokens, max_lora_rank)``.
            lora_b_stacked: ``(max_loras, 1, embedding_dim, max_lora_rank)``.
        """
        width = min(y.shape[-1], lora_b_stacked.shape[-2])
        if width < lora_b_stacked.shape[-2] or not add_inputs or unknown:
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **unknown)
        else:
            self.add_expand(y, x.unsqueeze(0), (lora_b_stacked,), (width,))

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **unknown: Any,
    ) -> None:
        """Add LoRA to the logits ``y`` ``(prompts, vocabulary)``, in place; ``x`` is ``(prompts, hidden)``.

        A row of ``y`` can have padding at its end. If there are more rows than prompts (prompt logprobs), vLLM
        is called, which raises an error.
        """
        width = lora_b_stacked.shape[-2]
        is_known = not unknown and width <= y.shape[-1]
        if (
            not is_known
            or torch.compiler.is_compiling()
            or not self._grouped_prompts.fits_exactly(_count_rows(x))
        ):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **unknown)
        elif self._grouped_prompts.groups:
            cpu_products.add(
                _flatten(y),
                _flatten(x),
                self._find_slices(lora_a_stacked, lora_b_stacked, (width,)),
                scale,
                self._grouped_prompts,
            )

    def _find_slices(self, lora_a: Any, lora_b: Any, widths: Sequence[int]) -> tuple[Slice, ...]:
        """Return a layer's slices. They are kept for as long as its tensors are the same ones.

        Args:
            lora_a: the layer's tensors, or its one tensor.
            lora_b: likewise.
            widths: width of each slice.
        """
        kept = self._kept_slices.get(id(lora_a))
        if kept is not None and kept[0] is lora_a and kept[1] is lora_b:
            return kept[2]
        is_one = isinstance(lora_a, torch.Tensor)
        slices = cpu_products.prepare(
            (lora_a,) if is_one else lora_a, (lora_b,) if is_one else lora_b, widths
        )
        if isinstance(lora_a, (tuple, torch.Tensor)):  # a list can change
            self._kept_slices[id(lora_a)] = lora_a, lora_b, slices
        return slices


def _count_rows(x: torch.Tensor) -> int:
    rows: int = x.shape[0] if x.ndim == 2 else x.shape[:-1].numel()
    return rows


def _flatten(x: torch.Tensor) -> torch.Tensor:
    """Return a view of two dimensions, as vLLM's wrapper does."""
    return x if x.ndim == 2 else x.view(-1, x.shape[-1])
