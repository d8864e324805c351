# SPDX-License-Identifier: Apache-2.0
"""Read experts' modules that are apart or stacked by projection. Pure torch, no vLLM.

- *apart*: a module per expert and projection, such as ``3.gate_proj`` or ``3.w1``: A ``(r, columns)``
  and B ``(rows, r)``;
- *stacked*: a module per projection, such as ``gate_proj`` or ``w1``: A ``(experts, r, columns)`` and B
  ``(experts, rows, r)``, with 1 in place of ``experts`` if they share the matrix (Tinker; MLX-LM 0.32;
  Megatron-Bridge 067f987).

One matrix can be apart and the other one stacked (Megatron-Bridge's shared outer matrices).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from vllm_nway_lora.adapters.config import find_pattern
from vllm_nway_lora.adapters.expert_types import Given, Mixture, Projection
from vllm_nway_lora.adapters.target import LayoutError
from vllm_nway_lora.rows.pairs import find_pair_fault, find_shape_fault

#: The last part of a module's name -> the projection.
KINDS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}


class _Matrix(NamedTuple):
    """One expert's A or B, the module that it is of, and the module's scaling."""

    tensor: torch.Tensor
    module: str
    scaling: float


def parse_module(suffix: str, mixture: Mixture) -> tuple[str, int | None]:
    """Return the projection of a module's name, and the expert; None for all experts.

    Raises:
        LayoutError: the mixture has no such module.
    """
    number, dot, leaf = suffix.partition(".")
    if not dot:
        number, leaf = "", suffix
    own = mixture.modules[0] if mixture.modules else {}
    kinds = KINDS | {module.partition(".")[2]: kind for kind, module in own.items()}
    kind = kinds.get(leaf, "")
    name = mixture.place(suffix)
    if not kind or (number and not number.isdecimal()):
        raise LayoutError(
            f"{name}: no module of a mixture has this name. They are {', '.join(KINDS)}, with or "
            "without the number of an expert before"
        )
    if number and int(number) >= mixture.experts:
        raise LayoutError(
            f"{name}: the model has experts 0 to {mixture.experts - 1}. Use the adapter of this model"
        )
    if kind not in (*mixture.kinds, "gate_up" if mixture.is_gated else ""):
        raise LayoutError(f"{name}: the model's experts have up_proj and down_proj only")
    if number and kind == "gate_up" and mixture.is_interleaved:
        raise LayoutError(
            f"{name}: nothing tells whether its rows of gate and up alternate. Save gate_proj and "
            "up_proj apart, or gate_up_proj of all experts in one tensor"
        )
    return kind, int(number) if number else None


def find_values(patterns: str, default: str, config: Mapping[str, Any], key: str) -> list[Any]:
    """Return PEFT's value for a module or parameter; several if a pattern's path may be another's.

    The first pattern that matches wins (``get_pattern_key``, peft/utils/other.py). The paths are those
    of transformers, and ``key`` is vLLM's.
    """
    values = config.get(patterns) or {}
    if (value := find_pattern(values, key, None)) is not None:
        return [value]
    usual = [config[default]] if default in config else []
    leaf = key.rpartition(".")[2]
    return usual + [value for pattern, value in values.items() if pattern.endswith(leaf)]


def read_kind(
    kind: str,
    modules: Mapping[int | None, tuple[str, Given]],
    mixture: Mixture,
    config: Mapping[str, Any],
) -> Projection:
    """Return one projection of all experts, with the highest of their ranks.

    Args:
        kind: the projection.
        modules: the expert, or None for all of them -> the module's name and tensors.
        mixture: the mixture.
        config: adapter_config.json: ``r`` and ``rank_pattern``.

    Raises:
        LayoutError: a tensor is missing, there twice, or of another shape or rank.
    """
    a, b = (_collect(half, kind, modules, mixture) for half in ("a", "b"))
    stacked = modules[None][0] if None in modules else None
    for e in sorted(a.keys() ^ b.keys()):
        alone = a[e] if e in a else b[e]
        given, missing = ("A", "B") if e in a else ("B", "A")
        if alone.module != stacked or not a or not b:
            raise LayoutError(
                f"{mixture.place(alone.module)}: it has LoRA-{given} but no LoRA-{missing}"
            )
    present = sorted(a.keys() & b.keys())
    columns, rows = mixture.size(kind)
    for e in present:
        name = mixture.place(b[e].module)
        fault = find_pair_fault(a[e].tensor, b[e].tensor) or find_shape_fault(
            a[e].tensor, b[e].tensor, columns, rows
        )
        ranks = find_values(
            "rank_pattern", "r", config, f"{mixture.source or mixture.path}.{b[e].module}"
        )
        if not fault and ranks and a[e].tensor.shape[0] not in ranks:
            fault = (
                f"adapter_config.json says rank {' or '.join(map(str, ranks))}, found LoRA-A "
                f"{tuple(a[e].tensor.shape)} and LoRA-B {tuple(b[e].tensor.shape)}"
            )
        if fault:
            raise LayoutError(f"{name}: {fault}")
        if a[e].scaling != b[e].scaling:
            raise LayoutError(
                f"{name}: its scaling is {b[e].scaling:.6g}, that of its LoRA-A in "
                f"{mixture.name(a[e].module)} is {a[e].scaling:.6g}"
            )
    scalings = {a[e].scaling for e in present}
    rank = max(a[e].tensor.shape[0] for e in present)
    first = present[0]
    no_a = a[first].tensor.new_zeros(rank, columns)
    no_b = b[first].tensor.new_zeros(rows, rank)
    all_a, all_b = [no_a] * mixture.experts, [no_b] * mixture.experts
    for e in present:
        more = rank - a[e].tensor.shape[0]
        all_a[e] = pad(a[e].tensor, (0, 0, 0, more)) if more else a[e].tensor
        all_b[e] = pad(b[e].tensor, (0, more)) if more else b[e].tensor
        if len(scalings) > 1:
            all_b[e] = all_b[e].float() * a[e].scaling
    scaling = 1.0 if len(scalings) > 1 else scalings.pop()
    return Projection(all_a, all_b, scaling, frozenset(range(mixture.experts)) - set(present))


def _collect(
    half: str, kind: str, modules: Mapping[int | None, tuple[str, Given]], mixture: Mixture
) -> dict[int, _Matrix]:
    """Return the matrices A or B, by expert."""
    found = {}
    for e, (name, given) in modules.items():
        tensor: torch.Tensor | None = getattr(given, half)
        if e is not None and tensor is not None:
            found[e] = _Matrix(tensor, name, given.scaling)
    if None not in modules:
        return found
    name, given = modules[None]
    stack: torch.Tensor | None = getattr(given, half)
    if stack is None:
        return found
    if found:
        other = next(iter(found.values())).module
        raise LayoutError(
            f"{mixture.name(name)} has LoRA-{half.upper()} of all experts, and "
            f"{mixture.name(other)} has one too"
        )
    if stack.ndim != 3 or stack.shape[0] not in (1, mixture.experts):
        columns, rows = mixture.size(kind)
        size = f"r, {columns}" if half == "a" else f"{rows}, r"
        raise LayoutError(
            f"{mixture.place(name)}: expected LoRA-{half.upper()} ({mixture.experts}, {size}), or "
            f"(1, {size}) for a matrix that its experts share, found {tuple(stack.shape)}"
        )
    tensors = list(stack.unbind())
    if len(tensors) < mixture.experts:
        once = tensors[0]
        tensors = [once if half == "a" else once.clone() for _ in range(mixture.experts)]
    return {e: _Matrix(tensor, name, given.scaling) for e, tensor in enumerate(tensors)}
