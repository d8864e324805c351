# SPDX-License-Identifier: Apache-2.0
"""Trace where the rows and columns of a checkpoint's modules land on this rank.

The model's own ``load_weights`` is the authority. It runs on a *twin*: the model's class, built for
this rank without memory. Each module's weight is passed to it under the module's name in a
checkpoint, with numbers in place of values. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_nway_lora.rows import codes
from vllm_nway_lora.rows.recorder import Call, TraceError, fold, record, renumber, say

#: The number of modules of a model that are asked alone.
_MAX_ALONE = 100


@dataclass(frozen=True, eq=False)
class Place:
    """The part of one parameter that one module's weight fills on this rank.

    Attributes:
        parameter: the parameter's path in the model.
        rows: int64, shape ``(local rows,)``: the module's row in each row, -1 where none is.
        columns: int64, shape ``(local columns,)``: the module's column in each column, or -1.
        received: the rows that the model passes to the parameter's loader, over all ranks.
    """

    parameter: str
    rows: torch.Tensor
    columns: torch.Tensor
    received: int


@dataclass(frozen=True, eq=False)
class Traced:
    """What is known of one module.

    Attributes:
        places: one per call of a parameter's loader, in order; empty if the model has no such module.
        shards: per place, the shard ids that the model has passed to the loader.
        fault: the reason why the module could not be traced; empty if it was.
        is_changed: whether the model changes the weight's values, so that W + B A is no longer its sum.
        is_unknown: whether the module was asked together with others, and one of them was changed.
    """

    places: tuple[Place, ...] = ()
    shards: tuple[Sequence[Any], ...] = ()
    fault: str = ""
    is_changed: bool = False
    is_unknown: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the parameters."""
        return tuple(place.parameter for place in self.places)


def trace_modules(twin: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Traced]:
    """Trace modules through ``twin.load_weights``.

    Every module is passed once as a tensor without memory, which shows the loaders that it reaches.
    Of the modules that reach theirs in the same way, such as those of equal layers, one is numbered.

    Args:
        twin: the model's class, built on the meta device for this rank and without quantisation.
        shapes: module's name in a checkpoint -> (rows over all ranks, columns over all ranks).
    """
    calls, faults = record(twin, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in shapes:
        of_module = calls.get(name, ())
        same = name if name in faults else tuple(call.signature() for call in of_module)
        groups.setdefault((fold(name), shapes[name], same), []).append(name)
    firsts = {names[0]: shapes[names[0]] for names in groups.values()}
    found = _number_all(twin, firsts)
    # A class that holds weights back, until it has those of a pair or of the whole model, shows them
    # under a later name.
    if any(
        found[first].paths != tuple(call.path for call in calls.get(first, ()))
        for first in firsts.keys() - faults.keys()
        if not found[first].fault
    ):
        return _number_by_layer(
            twin, shapes, [c for of_module in calls.values() for c in of_module]
        )
    for first, *others in groups.values():
        for name in others:
            moved = tuple(
                dataclasses.replace(place, parameter=call.path)
                for call, place in zip(calls.get(name, ()), found[first].places, strict=False)
            )
            found[name] = dataclasses.replace(found[first], places=moved)
    return found


def _number_by_layer(
    twin: nn.Module, shapes: Mapping[str, tuple[int, int]], calls: Sequence[Call]
) -> dict[str, Traced]:
    """Number one module of each name and shape; use it for the layers whose parameters load alike.

    Args:
        twin: as for :func:`trace_modules`.
        shapes: as for :func:`trace_modules`.
        calls: what reaches the loaders if all modules are passed, in an order that shows no names.
    """
    reaching: dict[str, Counter[tuple[Any, ...]]] = {}
    for call in calls:
        reaching.setdefault(call.path, Counter())[call.signature()] += 1
    firsts: dict[tuple[str, tuple[int, int]], str] = {}
    for name, shape in shapes.items():
        firsts.setdefault((fold(name), shape), name)
    found = _number_all(twin, {name: shapes[name] for name in firsts.values()})
    rest = {}
    for name, shape in shapes.items():
        first = firsts[fold(name), shape]
        places = [(place, renumber(place.parameter, first, name)) for place in found[first].places]
        if all(reaching.get(place.parameter) == reaching.get(path) for place, path in places):
            moved = tuple(dataclasses.replace(place, parameter=path) for place, path in places)
            found[name] = dataclasses.replace(found[first], places=moved)
        else:
            rest[name] = shape
    return found | _number_all(twin, rest)


def _number_all(twin: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Traced]:
    """Number modules, in parts whose numbers fit float32."""
    found: dict[str, Traced] = {}
    part: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        if part and sum(map(max, part.values())) + max(shape) > codes.MAX_NUMBERS:
            found |= _number(twin, part)
            part = {}
        part[name] = shape
    found |= _number(twin, part) if part else {}
    unknown = [name for name, traced in found.items() if traced.is_unknown]
    for name in unknown[:_MAX_ALONE]:
        found |= _number(twin, {name: shapes[name]})
    return found


def _number(twin: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Traced]:
    """Trace modules by two loads: of their rows' numbers, then of their columns' numbers."""
    faults: dict[str, str] = {}
    changed: set[str] = set()
    is_unknown = False
    sides: list[dict[tuple[str, int], tuple[Call, torch.Tensor]]] = []
    for along, read in ((0, _load_rows), (1, _load_columns)):
        numbering = codes.Codes({name: shape[along] for name, shape in shapes.items()})
        numbers = {  # takes no memory
            name: numbering.of(name).unsqueeze(1 - along).expand(shape)
            for name, shape in shapes.items()
        }
        calls, failed = record(twin, numbers)
        faults |= failed
        side: dict[tuple[str, int], tuple[Call, torch.Tensor]] = {}
        owned = [
            (passed, call, numbering.owners(call.loaded))
            for passed, of_module in calls.items()
            for call in of_module
        ]
        # Without numbers that are known, a call belongs to the module that was passed last, unless
        # the class holds weights back.
        is_lazy = all(passed in names for passed, _, names in owned if names)
        is_unknown = is_unknown or (not is_lazy and not all(names for _, _, names in owned))
        for passed, call, known in owned:
            names = known or ([passed] if is_lazy else [])
            try:
                for vector in read(call):
                    for name, index in numbering.decode(vector).items():
                        number = sum(of == name for of, _ in side)
                        side[name, number] = call, index
            except Exception as error:  # any loader, also of other packages
                if isinstance(error, codes.ChangedError):
                    changed |= {*names}
                for name in names:
                    faults.setdefault(name, say(error))
        sides.append(side)
    rows, columns = sides
    found: dict[str, Traced] = {}
    for name in shapes:
        keys = [key for key in rows if key[0] == name]
        if name not in faults and set(keys) != {key for key in columns if key[0] == name}:
            faults[name] = "its rows and its columns reach different parameters"
        if name in faults:
            found[name] = Traced(fault=faults[name], is_changed=name in changed)
            continue
        if not keys:
            found[name] = Traced(is_unknown=is_unknown and len(shapes) > 1)
            continue
        found[name] = Traced(
            tuple(
                Place(call.path, index, columns[key][1], len(call.loaded))
                for key in keys
                for call, index in [rows[key]]
            ),
            tuple(rows[key][0].shard_ids() for key in keys),
        )
    return found


def _load_rows(call: Call) -> list[torch.Tensor]:
    """Return the row numbers in the parameter: its loader runs on one column of them."""
    loaded, parameter = call.loaded, call.parameter
    _check_matrix(call)
    column = loaded[:, :1]
    if loaded.stride(1) and not torch.equal(loaded, column.expand_as(loaded)):
        raise TraceError("the model loads it transposed or mixes its columns")
    # A row-parallel loader takes this rank's part of the columns.
    parts = max(1, loaded.shape[1] // parameter.shape[1])
    shadow = make_shadow(parameter, (parameter.shape[0], 1))
    call.loader(shadow, column.expand(-1, parts).contiguous(), *call.args, **call.kwargs)
    return [shadow.data[:, 0]]


def _load_columns(call: Call) -> list[torch.Tensor]:
    """Return the column numbers in the parameter: its loader runs on one row of them.

    Several where a model joins the weights of several modules before the loader runs.
    """
    loaded, parameter = call.loaded, call.parameter
    _check_matrix(call)
    rows = loaded[:1]
    if loaded.stride(0) and not torch.equal(loaded, rows.expand_as(loaded)):
        rows = loaded.unique(dim=0)
    if loaded.shape[1] == parameter.shape[1]:
        return list(rows)  # only rows are sharded
    found = []
    for row in rows:
        shadow = make_shadow(parameter, (1, parameter.shape[1]))
        call.loader(shadow, row.unsqueeze(0), *call.args, **call.kwargs)
        found.append(shadow.data[0])
    return found


def _check_matrix(call: Call) -> None:
    if call.loaded.dim() != 2 or call.parameter.dim() != 2:
        raise TraceError(
            f"it arrives with {call.loaded.dim()} dimensions at {call.path}, which has "
            f"{call.parameter.dim()}"
        )


def make_shadow(parameter: Any, shape: tuple[int, ...]) -> Any:
    """Return a parameter like ``parameter``, of another shape, in memory, float32, all -1."""
    data = torch.full(shape, -1.0, dtype=torch.float32, device="cpu")
    shadow = torch.Tensor._make_subclass(type(parameter), data, False)
    vars(shadow).update(vars(parameter))
    return shadow
