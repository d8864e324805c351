# SPDX-License-Identifier: Apache-2.0
"""The pairs of an adapter, and what a model takes of them. Pure torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_nway_lora.adapters.errors import AdapterError


class LayoutError(AdapterError):
    """A layout that has no exact translation; the message is a phrase that names the modules."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The LoRA of one module. Its product is ``scaling * b @ a``.

    Attributes:
        a: LoRA-A, ``(r, columns)``, of any floating-point type.
        b: LoRA-B, ``(rows, r)``, as ``a``.
        scaling: the factor, such as ``lora_alpha / r``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class Part:
    """One output of a fused module: rows ``start`` to ``stop`` of the module's LoRA-B."""

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class Target:
    """The names that a model's LoRA layers take, by path in vLLM's model.

    Attributes:
        modules: module -> the rows of its LoRA-B over all ranks, None where a layer does not say.
        columns: module -> the columns of its LoRA-A over all ranks, None where a layer does not say.
        fused: fused layer -> its modules, in the order of their rows. Only layers whose modules have
            other names than the layer.
        parts: path that a module of one output would have -> its place in the fused module.
        mixtures: the layers of experts.
        absent: layers that this rank does not have (pipeline parallelism).
        unwrapped: modules of layers without LoRA here (``--lora-target-modules``).
        aliases: name in transformers -> path of a module, a part, a fused layer or a mixture.
    """

    modules: Mapping[str, int | None]
    columns: Mapping[str, int | None] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    mixtures: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()
    unwrapped: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
