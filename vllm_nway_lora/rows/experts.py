# SPDX-License-Identifier: Apache-2.0
"""Trace where the rows and columns of a mixture's experts land on this rank.

As for other modules (``trace.py``), the model's own ``load_weights`` is the authority. All experts of
a mixture are passed in one load. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_nway_lora.rows.codes import ChangedError, Codes
from vllm_nway_lora.rows.recorder import Call, TraceError, fold, record, say
from vllm_nway_lora.rows.trace import make_shadow

#: A copy of a weight that a model may make while it loads numbers: 64 MiB.
_MAX_COPIED = 2**24


@dataclass(frozen=True, eq=False)
class Grid:
    """What one weight of a mixture, ``(local experts, rows, columns)``, holds on this rank.

    Attributes:
        modules: int64, ``(local experts, rows)``: the number of the module in each row, -1 where none is.
        experts: int64, the same shape: the expert of a module that has the weights of all, else 0.
        rows: int64, ``(local experts or 1, rows)``: the module's row in each row, or -1. One for all
            experts if they are alike.
        columns: int64, ``(local experts or 1, 2, columns)``: the module's column in each column of the
            first half and of the second half of the rows, or -1.
    """

    modules: torch.Tensor
    experts: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class LoadStyle(NamedTuple):
    """How a model loads the weights of experts.

    Attributes:
        is_transposed: whether a checkpoint has columns before rows.
        is_copied: whether the model copies them into the parameters itself, without their loaders.
    """

    is_transposed: bool
    is_copied: bool


@dataclass(frozen=True, eq=False)
class HeldExperts:
    """What the two weights of a mixture of experts hold on this rank.

    Attributes:
        kinds: the names of an expert's modules, in the order of vLLM's slots: gate, down and up; up
            and down; or gate_up and down of all experts.
        shapes: per kind, an expert's rows and columns over all ranks.
        w13: the weight of gate and up. Module ``n`` is kind ``n % len(kinds)``.
        w2: the weight of down.
        is_stacked: whether a module has the weights of all experts.
        style: how the weights reach the parameters.
    """

    kinds: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    w13: Grid
    w2: Grid
    is_stacked: bool
    style: LoadStyle


def trace_mixture(
    twin: nn.Module,
    paths: tuple[str, str],
    names: Sequence[str],
    kinds: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    stack: int = 0,
) -> HeldExperts | None:
    """Trace a mixture; return None if the model has no modules of these names.

    Args:
        twin: the model's class, built on the meta device for this rank and without quantisation.
        paths: the paths of the mixture's two weights in the twin.
        names: the modules' names in a checkpoint, expert by expert, in the order of ``kinds``.
        kinds: as for :class:`HeldExperts`.
        shapes: as for :class:`HeldExperts`.
        stack: the number of experts whose weights a module has in one tensor, else 0.

    Raises:
        TraceError: a weight does not arrive as a copy of its rows and columns.
    """
    fault: TraceError | None = None
    for style in (
        LoadStyle(t, c) for c in (False, True) for t in ((False, True) if stack else (False,))
    ):
        try:
            if grids := _trace(twin, paths, names, shapes, stack, style):
                return HeldExperts(kinds, shapes, grids[0], grids[1], bool(stack), style)
        except ChangedError:
            raise
        except TraceError as error:
            fault = fault or error
    if fault:
        raise fault
    return None


def record_shapes(
    twin: nn.Module, shapes: Mapping[str, tuple[int, ...]], suffix: str, style: LoadStyle
) -> dict[str, list[Call]]:
    """Return what reaches the loaders from each module, with tensors without memory.

    Args:
        twin: as for :func:`trace_mixture`.
        shapes: module's name in a checkpoint -> the shape of its weight, rows before columns.
        suffix: what follows the module's name in the name of its weight.
        style: as for :class:`HeldExperts`.

    Raises:
        TraceError: a module cannot be loaded.
    """
    one = torch.empty((), device="meta")
    return _record(twin, {n: one.expand(shape) for n, shape in shapes.items()}, suffix, style)


def sign(calls: Sequence[Call]) -> list[tuple[Any, ...]]:
    """Return what is equal for the mixtures of layers that load alike."""
    return [
        (
            fold(call.path),
            *(_fold_value(value) for value in call.args),
            *((name, _fold_value(value)) for name, value in call.kwargs.items()),
            tuple(call.loaded.shape),
            tuple(call.parameter.shape),
        )
        for call in calls
    ]


def _fold_value(value: Any) -> str:
    # Texts are names of parameters or shards; a number is an expert.
    return fold(value) if isinstance(value, str) else repr(value)


def _record(
    twin: nn.Module, weights: Mapping[str, torch.Tensor], suffix: str, style: LoadStyle
) -> dict[str, list[Call]]:
    if style.is_transposed:
        weights = {name: weight.transpose(-1, -2) for name, weight in weights.items()}
    calls, faults = record(twin, weights, suffix, style.is_copied)
    for name, fault in faults.items():
        raise TraceError(f"{name}: {fault}")
    return calls


def _trace(
    twin: nn.Module,
    paths: tuple[str, str],
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    stack: int,
    style: LoadStyle,
) -> list[Grid]:
    """Return the grids of both weights; none if no module reaches a loader.

    Three loads: of the modules' and experts' numbers, of the rows' numbers, of the columns' numbers.
    """
    suffix = "" if stack else ".weight"
    whole = {
        name: (*([stack] if stack else []), *shapes[number % len(shapes)])
        for number, name in enumerate(names)
    }
    calls = [c for of in record_shapes(twin, whole, suffix, style).values() for c in of]
    if not calls:
        return []
    if others := {call.path for call in calls} - {*paths}:
        raise TraceError(f"its weights are loaded into {', '.join(sorted(others))} too")
    for call in calls:
        if call.loaded.numel() > _MAX_COPIED and all(call.loaded.stride()[-2:]):
            raise TraceError("the model copies the weights of all experts while it loads them")
    kinds = [str(number) for number in range(len(shapes))]
    of_modules = Codes(dict.fromkeys(names, stack or 1))
    of_rows = Codes({kind: shape[0] for kind, shape in zip(kinds, shapes, strict=True)})
    of_columns = Codes({kind: shape[1] for kind, shape in zip(kinds, shapes, strict=True)})
    sides: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, name in enumerate(names):
        kind = kinds[number % len(kinds)]
        numbers = (
            of_modules.of(name).reshape(-1, *([1, 1] if stack else [])),
            of_rows.of(kind).unsqueeze(1),
            of_columns.of(kind),
        )
        for side, of_side in zip(sides, numbers, strict=True):
            side[name] = of_side.expand(whole[name])  # takes no memory
    modules, rows, columns = (
        _load(_record(twin, side, suffix, style), along)
        for side, along in zip(sides, (-1, -1, -2), strict=True)
    )
    found = []
    for path in paths:
        if path not in modules.keys() & rows.keys() & columns.keys():
            raise TraceError(f"nothing is loaded into {path}")
        found.append(
            Grid(
                *of_modules.locate(modules[path][:, :, 0]),
                of_rows.locate(_fold_alike(rows[path][:, :, 0]))[1],
                of_columns.locate(_fold_alike(columns[path]))[1],
            )
        )
    return found


def _fold_alike(numbers: torch.Tensor) -> torch.Tensor:
    """Return the first expert's numbers, ``(1, ...)``, if all experts have the same."""
    return numbers[:1] if bool((numbers == numbers[:1]).all()) else numbers


def _load(calls: Mapping[str, Sequence[Call]], along: int) -> dict[str, torch.Tensor]:
    """Run the loaders of numbers that are constant along a dimension; return what each weight gets.

    Args:
        calls: what has reached the loaders, per module.
        along: -1 or -2: the dimension along which one number, or two, stand for all.
    """
    kept = 1 if along == -1 else 2
    found: dict[str, Any] = {}
    for call in itertools.chain.from_iterable(calls.values()):
        loaded, parameter = call.loaded, call.parameter
        if loaded.dim() not in (2, 3) or parameter.dim() != 3:
            raise TraceError(
                f"it arrives with {loaded.dim()} dimensions at {call.path}, which has "
                f"{parameter.dim()}"
            )
        one = loaded.narrow(along, 0, 1)
        if loaded.stride(along) and not torch.equal(loaded, one.expand_as(loaded)):
            raise TraceError("the model loads it transposed or mixes its rows and columns")
        if call.path not in found:
            shape = list(parameter.shape)
            shape[along] = kept
            found[call.path] = make_shadow(parameter, tuple(shape))
        # A loader takes this rank's part of the rows, or of the columns, and gate or up half of them.
        shape = list(loaded.shape)
        shape[along] = max(1, shape[along] * kept // parameter.shape[along])
        try:
            call.loader(found[call.path], one.expand(shape), *call.args, **call.kwargs)
        except Exception as error:  # any loader, also of other packages
            raise TraceError(say(error)) from error
    return {path: shadow.data for path, shadow in found.items()}
