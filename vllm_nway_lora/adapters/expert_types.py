# SPDX-License-Identifier: Apache-2.0
"""What a mixture of experts takes, and the LoRA of its experts in no layout. Pure torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from vllm_nway_lora.adapters.target import Pair


class Swaps(NamedTuple):
    """Whether PEFT swaps the columns and rows of a model's experts, by its release.

    PEFT to 0.18 takes every parameter for ``(experts, columns, rows)``. From 0.19 on it takes them for
    ``(experts, rows, columns)``, unless transformers' class has a true ``is_transposed``
    (``ParamWrapper.update_layer``, peft/tuners/lora/layer.py). No class has it in transformers 4.

    Attributes:
        old: PEFT to 0.18 does; None if that depends on the release of transformers.
        new: PEFT from 0.19 on does; None as for ``old``.
    """

    old: bool | None
    new: bool | None


#: Transformers' parameters are ``(experts, rows, columns)``, as nearly all are.
USUAL = Swaps(old=True, new=False)


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts, and what its LoRA layer takes.

    Attributes:
        path: its path in vLLM's model, such as ``model.layers.0.mlp.experts``.
        experts: the number of experts over all ranks.
        hidden: the columns of gate_proj and up_proj, the rows of down_proj.
        intermediate: the rows of gate_proj and of up_proj, the columns of down_proj.
        is_stacked: it takes gate_up_proj as the module ``base_layer`` and down_proj as the module of
            the mixture itself, as PEFT nests them.
        is_shared: it takes ``w1``, ``w2`` and ``w3``, with one A of w1 and of w3 and one B of w2 for
            all experts (``--enable-moe-shared-loras``).
        is_gated: an expert has gate_proj.
        is_interleaved: the rows of gate_up_proj are gate, up, gate, up; else those of gate come first.
        swaps: what PEFT does to the model's parameters.
        modules: where it takes experts apart: per expert, projection -> module below ``path``.
        local: the experts that this rank has.
        scales_alike: vLLM scales all modules as the first one.
        layer: the LoRA layer's class, for messages.
        source: its name in the adapter's file, which PEFT's patterns are for; empty if it is ``path``.
    """

    path: str
    experts: int
    hidden: int
    intermediate: int
    is_stacked: bool = False
    is_shared: bool = False
    is_gated: bool = True
    is_interleaved: bool = False
    swaps: Swaps = USUAL
    modules: Sequence[Mapping[str, str]] = ()
    local: Sequence[int] = ()
    scales_alike: bool = False
    layer: str = ""
    source: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The projections of an expert, in the order of their rows and of the forward."""
        return ("gate", "up", "down") if self.is_gated else ("up", "down")

    def size(self, kind: str) -> tuple[int, int]:
        """Return the columns and the rows of a projection: gate, up, down or gate_up."""
        if kind == "down":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate * (2 if kind == "gate_up" else 1)

    def name(self, suffix: str) -> str:
        """Return a module's name in a message."""
        return f"module {self.path}.{suffix}" if suffix else f"module {self.path}"

    def place(self, suffix: str) -> str:
        """Return a module's name and its layer, the beginning of a message."""
        return f"{self.name(suffix)} (layer {self.path}, {self.layer})"


@dataclass(frozen=True, eq=False)
class Half:
    """A module that may lack a tensor: a matrix that experts share is a module of its own.

    Attributes:
        a: LoRA-A or None.
        b: LoRA-B or None.
        scaling: the factor.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float = 1.0


Given: TypeAlias = Pair | Half


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of all experts; the product of expert e is ``scaling * b[e] @ a[e]``.

    Attributes:
        a: ``(r, columns)`` of each expert. Experts that share it have the same tensor.
        b: ``(rows, r)`` of each expert. vLLM scales it in place, so only zeros are shared.
        scaling: the factor.
        absent: the experts without LoRA, whose tensors are zeros.
    """

    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]
    scaling: float
    absent: frozenset[int] = frozenset()

    @property
    def rank(self) -> int:
        """LoRA's r."""
        return int(self.a[0].shape[0])

    def fold(self) -> Projection:
        """Return the same products with the scaling in B, in float32."""
        return Projection(self.a, [b.float() * self.scaling for b in self.b], 1.0, self.absent)
