# SPDX-License-Identifier: Apache-2.0
"""Read experts' tensors as PEFT's ``target_parameters`` writes them. Pure torch, no vLLM.

``ParamWrapper`` (peft/tuners/lora/layer.py, 0.17 to 0.21) wraps one parameter of all experts. Wrappers of
two parameters are nested: ``experts.base_layer`` is the first one of the class, ``experts`` is the
second one, or the only one. A is ``(experts * r, columns)``, the expert slowest. B is ``(rows, r *
experts)``, the expert fastest. Columns and rows are swapped in some releases (:class:`Swaps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from vllm_nway_lora.adapters.config import find_scaling
from vllm_nway_lora.adapters.expert_readers import find_values
from vllm_nway_lora.adapters.expert_types import Given, Mixture, Projection
from vllm_nway_lora.adapters.target import LayoutError

#: The module of the mixture, and the one that PEFT nests in it.
OUTER, INNER = "", "base_layer"

#: adapter_config.json: ``"vllm_nway_lora": {"expert_lora_b": "expert-major"}`` says that B's columns are
#: ordered by expert. Nothing else in a file tells: unsloth-zoo before pull request 1269 and the packed experts of
#: Megatron-Bridge 067f987 write so.
SETTINGS, ORDER, BY_RANK, BY_EXPERT = (
    "vllm_nway_lora",
    "expert_lora_b",
    "rank-major",
    "expert-major",
)


class _Stack(NamedTuple):
    """A nested module: ``a`` is ``(experts, r, inputs)``, ``b`` is ``(experts, outputs, r)``."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def size(self) -> tuple[int, int]:
        """The inputs and outputs, which are columns and rows of the weight, or rows and columns."""
        return self.a.shape[2], self.b.shape[1]


def read_nested(
    pairs: Mapping[str, Given], mixture: Mixture, config: Mapping[str, Any]
) -> tuple[dict[str, Projection], list[str]]:
    """Return the projections of nested modules, and phrases on what differs from vLLM's layout.

    Args:
        pairs: the module ``""``, ``"base_layer"`` or both.
        mixture: the mixture.
        config: adapter_config.json: ``r``, ``lora_alpha``, their patterns, ``use_rslora``,
            ``peft_version``, ``target_parameters``, and this package's setting.

    Raises:
        LayoutError: a tensor is missing, does not fit, or fits in two ways that nothing decides.
    """
    changes: dict[str, None] = {}
    order = _read_order(config)
    stacks: dict[str, tuple[str, _Stack]] = {}
    for suffix, given in pairs.items():
        stack = _unflatten(suffix, given, mixture, order, changes)
        kind = _find_kind(suffix, pairs, stack, mixture, config)
        if kind in stacks:
            raise LayoutError(
                f"{mixture.name(suffix)} and {mixture.name(stacks[kind][0])} both have the shapes of "
                f"{kind}_proj"
            )
        stacks[kind] = suffix, _scale(suffix, given, stack, kind, mixture, config)
        if stacks[kind][1].scaling != given.scaling:
            changes[f"{kind}_proj scaled as adapter_config.json says"] = None
        if suffix == (INNER if kind == "down" else OUTER) and len(pairs) > 1:
            changes["gate_up_proj and down_proj exchanged"] = None
    is_swapped = _find_orientation(stacks, mixture, config)
    if is_swapped:
        changes["columns and rows swapped back"] = None
    found = {}
    for kind, (_, stack) in stacks.items():
        a, b = (stack.b.mT, stack.a.mT) if is_swapped else (stack.a, stack.b)
        found[kind] = Projection(a.unbind(), b.unbind(), stack.scaling)
    return found, list(changes)


def _read_order(config: Mapping[str, Any]) -> str:
    settings = config.get(SETTINGS) or {}
    is_known = isinstance(settings, Mapping) and settings.keys() <= {ORDER}
    order = settings.get(ORDER, BY_RANK) if is_known else None
    if order not in (BY_RANK, BY_EXPERT):
        raise LayoutError(
            f"adapter_config.json has {SETTINGS}={settings!r}: expected "
            f'{{"{ORDER}": "{BY_EXPERT}"}} or {{"{ORDER}": "{BY_RANK}"}}'
        )
    return str(order)


def _unflatten(
    suffix: str, given: Given, mixture: Mixture, order: str, changes: dict[str, None]
) -> _Stack:
    """Return a module's tensors per expert.

    With three dimensions, B is ``(outputs, r, experts)``, as vLLM reads it, or ``(experts, outputs, r)``.
    """
    a, b, n = given.a, given.b, mixture.experts
    name = mixture.place(suffix)
    if a is None or b is None:
        half, missing = ("B", "A") if a is None else ("A", "B")
        raise LayoutError(f"{name}: it has LoRA-{half} but no LoRA-{missing}")
    shapes = f"found LoRA-A {tuple(a.shape)} and LoRA-B {tuple(b.shape)}"
    if a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % n == 0:
        a = a.reshape(n, -1, a.shape[1])
        if order == BY_EXPERT:
            changes["LoRA-B's columns ordered by rank"] = None
            return _Stack(a, b.reshape(b.shape[0], n, -1).transpose(0, 1), given.scaling)
        return _Stack(a, b.reshape(b.shape[0], -1, n).permute(2, 0, 1), given.scaling)
    if a.ndim == 3 and b.ndim == 3 and a.shape[0] == n:
        if b.shape[1:] == (a.shape[1], n):
            return _Stack(a, b.permute(2, 0, 1), given.scaling)
        if (b.shape[0], b.shape[2]) == (n, a.shape[1]):
            changes["LoRA-B's experts moved to its last dimension"] = None
            return _Stack(a, b, given.scaling)
    raise LayoutError(
        f"{name}: expected the tensors of {n} experts, LoRA-A ({n} * r, columns) and LoRA-B (rows, r * "
        f"{n}), or ({n}, r, columns) and (rows, r, {n}) or ({n}, rows, r), {shapes}"
    )


def _find_kind(
    suffix: str,
    pairs: Mapping[str, Given],
    stack: _Stack,
    mixture: Mixture,
    config: Mapping[str, Any],
) -> str:
    """Return which parameter a module is: its sizes tell, except for experts without a gate."""
    kinds = ("gate_up", "down") if mixture.is_gated else ("up", "down")
    fitting = [k for k in kinds if sorted(mixture.size(k)) == sorted(stack.size)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        sizes = " or ".join(
            f"{mixture.size(k)[0]} columns and {mixture.size(k)[1]} rows as {k}_proj" for k in kinds
        )
        raise LayoutError(
            f"{mixture.place(suffix)}: expected {sizes}, found LoRA-A of {stack.size[0]} columns and "
            f"LoRA-B of {stack.size[1]} rows"
        )
    if len(pairs) == 2:  # transformers' class has up_proj before down_proj
        return "down" if suffix == OUTER else "up"
    leaves = {str(name).rpartition(".")[2] for name in config.get("target_parameters") or ()}
    named = [k for k in kinds if f"{k}_proj" in leaves]
    if len(named) != 1:
        raise LayoutError(
            f"{mixture.place(suffix)}: its shapes fit up_proj and down_proj. `target_parameters` in "
            f"adapter_config.json must name one of both, and has {sorted(leaves)}"
        )
    return named[0]


def _scale(
    suffix: str,
    given: Given,
    stack: _Stack,
    kind: str,
    mixture: Mixture,
    config: Mapping[str, Any],
) -> _Stack:
    """Return a module with its scaling; check its rank.

    PEFT matches a pattern with the parameter's name. vLLM takes the module of the mixture for down_proj
    (``get_rank_and_scaling``, vllm/lora/peft_helper.py), and before 0.32.0 it knows no patterns.
    """
    key = f"{mixture.source or mixture.path}.{kind}_proj"
    ranks, alphas = (
        find_values("rank_pattern", "r", config, key),
        find_values("alpha_pattern", "lora_alpha", config, key),
    )
    rank = stack.a.shape[1]
    if ranks and rank not in ranks:
        raise LayoutError(
            f"{mixture.place(suffix)}: expected {kind}_proj of {mixture.experts} experts of rank "
            f"{' or '.join(map(str, ranks))}, as adapter_config.json says, found rank {rank}"
        )
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    if not has_patterns or len(ranks) != 1 or len(alphas) != 1:
        return stack
    return stack._replace(scaling=find_scaling(alphas[0], rank, config))


def _find_orientation(
    stacks: Mapping[str, tuple[str, _Stack]], mixture: Mixture, config: Mapping[str, Any]
) -> bool:
    """Return whether columns and rows are swapped: by shapes, else by PEFT's release."""
    by_shape = {
        stack.size != mixture.size(kind)
        for kind, (_, stack) in stacks.items()
        if mixture.size(kind)[0] != mixture.size(kind)[1]
    }
    if len(by_shape) == 1:
        return by_shape.pop()
    kind, (suffix, stack) = next(iter(stacks.items()))
    name = mixture.place(suffix)
    if by_shape:
        raise LayoutError(
            f"{name}: columns and rows are swapped in one of its two parameters only. "
            "Save the adapter again with one release of PEFT"
        )
    is_new = _is_new(config.get("peft_version"))
    possible = set(mixture.swaps if is_new is None else [mixture.swaps[is_new]])
    if len(possible) == 1 and None not in possible:
        return True in possible
    reason = (
        "the release of PEFT does not tell either. Save the adapter with both parameters, or apart for "
        "each expert"
        if None in possible
        else f"`peft_version` in adapter_config.json is {config.get('peft_version')!r}. Set the release "
        'of PEFT that has saved the adapter, such as "0.19.0"'
    )
    raise LayoutError(
        f"{name}: it is {kind}_proj alone and has as many columns as rows, {stack.size[0]}, so that "
        f"its shapes do not tell whether they are swapped, and {reason}"
    )


def _is_new(version: Any) -> bool | None:
    """Return whether a release of PEFT is 0.19 or later; None if it does not say.

    Development versions are before or after the change.
    """
    try:
        release = Version(str(version))
    except InvalidVersion:
        return None
    return None if release.is_devrelease else release.release >= (0, 19)
