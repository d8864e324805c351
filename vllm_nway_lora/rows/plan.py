# SPDX-License-Identifier: Apache-2.0
"""FusionPlan: from adapter-visible modules to runs of the fused output to this rank's rows.

Pure torch, no vLLM. A *fused projection* has N outputs (vLLM's ``output_sizes``); an adapter sees
it as M *modules*, each covering a run of consecutive outputs. A plan gives every module one
*slice*: the columns of this tensor-parallel rank's fused output that the module's LoRA-B writes,
and which rows of LoRA-B those are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch


class PlanError(ValueError):
    """A fused projection whose layout cannot be told exactly."""


@dataclass(frozen=True, eq=False)
class Output:
    """One output of a fused projection, as this rank's weight holds it.

    Attributes:
        rows: rows that a checkpoint has for this output, all ranks taken together.
        column: int64, shape ``(local fused width,)``: the row of this output that each row of the
            rank's weight holds, -1 where it holds none of them.
    """

    rows: int
    column: torch.Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of this rank's fused output that one module's LoRA-B writes.

    Attributes:
        module: the module's name, as adapters have it.
        rows: rows of the module's LoRA-B in an adapter.
        width: columns of the fused output from this slice's start to the next one's.
        offset: where the module's run starts within the slice. Columns of the slice outside the
            run are covered by no module and keep the base layer's output.
        local: int64, shape ``(rows held by this rank,)``: rows of LoRA-B, in the run's order.
    """

    module: str
    rows: int
    width: int
    offset: int
    local: torch.Tensor

    @cached_property
    def _index(self) -> slice | torch.Tensor:
        # A plain slice is a view: no copy of LoRA-B is made when an adapter is loaded.
        start = int(self.local[0])
        stop = start + len(self.local)
        if torch.equal(self.local, torch.arange(start, stop)):
            return slice(start, stop)
        return self.local

    @cached_property
    def run(self) -> slice:
        """The module's run, as columns of the slice."""
        return slice(self.offset, self.offset + len(self.local))

    def take(self, lora_b: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of ``lora_b``: ``(rows, r)`` to ``(len(local), r)``."""
        if isinstance(self._index, slice):
            return lora_b[self._index]
        # A quarter of the time that indexing by a tensor takes.
        return lora_b.index_select(0, self._index.to(lora_b.device))


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """How the adapter-visible modules of one fused projection map onto this rank's output.

    Attributes:
        fused: the projection's own name, the last part of its path.
        modules: adapter-visible modules, in the order of ``packed_modules_mapping``.
        slices: one per module, in output order; or, where ``by_rows``, one per output.
        by_rows: which outputs each module covers is not known by name, and is told by the row
            counts of each adapter (see :meth:`assign`).
        refusals: module -> why no adapter on it can be served; empty where all can.

    The slices' widths add up to the width of the rank's fused output.
    """

    fused: str
    modules: tuple[str, ...]
    slices: tuple[Slice, ...]
    by_rows: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)

    def assign(self, rows: Sequence[int | None]) -> Iterator[tuple[int, int, slice]]:
        """Say which rows of which module's LoRA-B each slice takes.

        Args:
            rows: per module, the rows of its LoRA-B in an adapter; None where it has none.

        Yields:
            ``(module index, slice index, rows of that module's LoRA-B)`` per slice to be written.

        Raises:
            PlanError: the row counts do not fit this projection, or fit it in several ways, or a
                module with rows is one of ``refusals``.
        """
        if len(rows) != len(self.modules):
            raise PlanError(
                f"{self.fused} has {len(self.modules)} modules ({', '.join(self.modules)}), "
                f"but LoRA-B was given for {len(rows)}"
            )
        for name, found in zip(self.modules, rows, strict=True):
            if found is not None and name in self.refusals:
                raise PlanError(f"module {name} of {self.fused}: {self.refusals[name]}")
        if self.by_rows:
            runs = partition_by_rows(self.fused, [s.rows for s in self.slices], self.modules, rows)
        else:
            runs = [range(i, i + 1) for i in range(len(rows))]
        for module, (run, found) in enumerate(zip(runs, rows, strict=True)):
            if found is None:
                continue
            expected = sum(self.slices[i].rows for i in run)
            if found != expected:
                raise PlanError(
                    f"module {self.modules[module]} of {self.fused}: "
                    f"expected LoRA-B with {expected} rows, found {found}"
                )
            start = 0
            for i in run:
                stop = start + self.slices[i].rows
                yield module, i, slice(start, stop)
                start = stop


def build_plan(
    fused: str,
    modules: Sequence[str],
    groups: Sequence[Sequence[int]] | None,
    outputs: Sequence[Output],
) -> FusionPlan:
    """Make the plan of one fused projection for one rank.

    Args:
        fused: the projection's own name.
        modules: its adapter-visible modules.
        groups: per module, the indices of the outputs it covers; None if names do not tell.
        outputs: the projection's outputs, as the layer's own weight loader places them.

    Raises:
        PlanError: the modules' runs are not contiguous, not in order, or overlap.
    """
    by_rows = groups is None
    if groups is None:
        groups = [[i] for i in range(len(outputs))]
        names = [f"{fused}[{i}]" for i in range(len(outputs))]
    else:
        names = list(modules)
    if [i for group in groups for i in group] != list(range(len(outputs))):
        raise PlanError(
            f"{fused}: modules {', '.join(names)} cover the outputs {[list(g) for g in groups]}, "
            f"which is not each of the {len(outputs)} outputs once and in order"
        )
    runs = [
        _locate(fused, name, [outputs[i] for i in group])
        for name, group in zip(names, groups, strict=True)
    ]
    width = len(outputs[0].column)
    starts = [start for start, _ in runs]
    stops = [start + len(local) for start, local in runs]
    if any(stop > start for stop, start in zip(stops, starts[1:], strict=False)):
        raise PlanError(
            f"{fused}: its weight loader places the modules {', '.join(names)} at "
            f"{list(zip(starts, stops, strict=True))}, which overlap or are out of order"
        )
    # vLLM's kernels write the slices one after another without gaps (`add_expand`), so columns
    # that no module covers belong to the slice before them, the first ones to the first slice.
    bounds = [0, *starts[1:], width]
    slices = [
        Slice(
            module=name,
            rows=sum(outputs[i].rows for i in group),
            width=bounds[n + 1] - bounds[n],
            offset=start - bounds[n],
            local=local,
        )
        for n, (name, group, (start, local)) in enumerate(zip(names, groups, runs, strict=True))
    ]
    return FusionPlan(fused, tuple(modules), tuple(slices), by_rows)


def refuse_all(fused: str, modules: Sequence[str], width: int, reason: str) -> FusionPlan:
    """Make a plan that holds no adapter: for a layer that can serve the base model only.

    Its slices are of no meaning but to give vLLM's warm-up, which sets zeros, something to set.
    """
    bounds = [width * n // len(modules) for n in range(len(modules) + 1)]
    slices = tuple(
        Slice(
            name, rows=stop - start, width=stop - start, offset=0, local=torch.arange(stop - start)
        )
        for name, start, stop in zip(modules, bounds, bounds[1:], strict=False)
    )
    return FusionPlan(fused, tuple(modules), slices, refusals=dict.fromkeys(modules, reason))


def _locate(fused: str, module: str, outputs: Sequence[Output]) -> tuple[int, torch.Tensor]:
    """Return where a module's run starts on this rank, and its rows in the run's order."""
    positions, rows, first_row = [], [], 0
    for output in outputs:
        held = torch.nonzero(output.column >= 0).flatten()
        positions.append(held)
        rows.append(output.column[held] + first_row)
        first_row += output.rows
    where, local = torch.cat(positions), torch.cat(rows)
    start = int(where[0]) if len(where) else 0
    if not len(where) or not torch.equal(where, torch.arange(start, start + len(where))):
        raise PlanError(
            f"{fused}: its weight loader does not place module {module} as one contiguous run of "
            f"this rank's output (columns {where.tolist()[:8]}...)"
        )
    return start, local


def partition_by_rows(
    fused: str,
    output_rows: Sequence[int],
    modules: Sequence[str],
    rows: Sequence[int | None],
) -> list[range]:
    """Return the only split of the outputs into consecutive runs that fits the row counts.

    Every module covers at least one output, runs are in module order and cover all outputs, and a
    module whose rows are known covers outputs that add up to exactly that many.

    Args:
        fused: the projection's own name, for the error.
        output_rows: rows of each output in a checkpoint.
        modules: names of the modules, for the error.
        rows: rows of each module's LoRA-B in an adapter; None where it has none.

    Raises:
        PlanError: no such split exists, or more than one that differs for a module with rows.
    """
    given = [module for module, count in enumerate(rows) if count is not None]
    fits: list[list[range]] = []
    for fit in _fits(output_rows, rows, 0):
        # Splits that differ only in where missing modules meet place every tensor alike.
        if not any(all(fit[m] == other[m] for m in given) for other in fits):
            fits.append(fit)
        if len(fits) > 1:
            break
    if len(fits) == 1:
        return fits[0]
    asked = ", ".join(
        f"{module}: {'not adapted' if count is None else f'{count} rows'}"
        for module, count in zip(modules, rows, strict=True)
    )
    found = (
        "none does"
        if not fits
        else "more than one does: " + " and ".join(str([list(run) for run in fit]) for fit in fits)
    )
    raise PlanError(
        f"{fused} has outputs of {list(output_rows)} rows. Exactly one split of them into "
        f"consecutive runs must fit the adapter ({asked}), but {found}"
    )


def _fits(
    output_rows: Sequence[int], rows: Sequence[int | None], first: int
) -> Iterator[list[range]]:
    if not rows:
        if first == len(output_rows):
            yield []
        return
    total = 0
    for last in range(first, len(output_rows)):
        total += output_rows[last]
        if rows[0] is None or rows[0] == total:
            for rest in _fits(output_rows, rows[1:], last + 1):
                yield [range(first, last + 1), *rest]
