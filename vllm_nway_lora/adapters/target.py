# SPDX-License-Identifier: Apache-2.0
"""The pairs of an adapter, and what a model takes of them. Pure torch, no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

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
