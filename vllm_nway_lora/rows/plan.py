# SPDX-License-Identifier: Apache-2.0
"""FusionPlan: the rows of each module's LoRA-B and their columns in this rank's fused output.

Pure torch, no vLLM. A *fused projection* has N outputs (vLLM's ``output_sizes``). An adapter sees
it as M *modules*, each of which covers consecutive outputs. A plan gives every module one *slice*:
the columns of this tensor-parallel rank's fused output that the module's LoRA-B writes, and the
rows of LoRA-B that belong there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.pairs import find_pair_fault, find_rank_fault, find_shape_fault


@dataclass(frozen=True, eq=False)
class Output:
    """One output of a fused projection, as this rank's weight holds it.

    Attributes:
        rows: rows of this output in a checkpoint, over all ranks.
        column: int64, shape ``(local fused width,)``: the row of this output in each row of the
            rank's weight, -1 where the weight's row belongs to another output.
    """

    rows: int
    column: torch.Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of this rank's fused output that one module's LoRA-B writes.

    Attributes:
        module: the module's name in adapters.
        rows: rows of the module's LoRA-B in an adapter.
        width: columns of the fused output from this slice's start to the next one's.
        offset: start of the module's run within the slice. Columns of the slice outside the run
            belong to no module and keep the base layer's output.
        local: int64, shape ``(rows held by this rank,)``: rows of LoRA-B, in the run's order.
    """

    module: str
    rows: int
    width: int
    offset: int
    local: torch.Tensor

    @cached_property
    def _index(self) -> slice | torch.Tensor:
        # A plain slice is a view: loading an adapter then copies no LoRA-B.
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
        # Takes a quarter of the time of indexing by a tensor.
        return lora_b.index_select(0, self._index.to(lora_b.device))


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """The slices of one fused projection on one tensor-parallel rank.

    Attributes:
        fused: the projection's own name, the last part of its path.
        slices: one per adapter-visible module, in the order of ``packed_modules_mapping``. Their
            widths add up to the width of the rank's fused output.
        refusals: module -> the reason why LoRA on it cannot be served.
        sources: per slice, the index of the module whose tensors fill it; empty if each fills its own.
            The other slices' modules have no weight in the checkpoint (Gemma 4: k_proj's fills v).
    """

    fused: str
    slices: tuple[Slice, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[int, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapter-visible modules, in the order of the slices."""
        return tuple(part.module for part in self.slices)

    @property
    def trained(self) -> tuple[str, ...]:
        """The modules that have a weight in a checkpoint, and so can have one in an adapter."""
        return tuple(m for number, m in enumerate(self.modules) if self.source(number) == number)

    def source(self, number: int) -> int:
        """Return the index of the module whose tensors fill slice ``number``."""
        return self.sources[number] if self.sources else number

    def validate(
        self,
        lora_a: Sequence[torch.Tensor | None],
        lora_b: Sequence[torch.Tensor | None],
        *,
        columns: int,
        max_rank: int,
    ) -> None:
        """Check that one adapter's tensors fit the modules.

        Args:
            lora_a: per module ``(r, columns)``, None where the adapter leaves the module out.
            lora_b: per module ``(rows over all ranks, r)``, None as for ``lora_a``.
            columns: the projection's input size.
            max_rank: ``--max-lora-rank``.

        Raises:
            PlanError: a tensor does not fit, or its module is one of ``refusals``.
        """
        if not len(lora_a) == len(lora_b) == len(self.slices):
            raise PlanError(
                f"{self.fused} has {len(self.slices)} modules ({', '.join(self.modules)}), found "
                f"{len(lora_a)} LoRA-A tensors and {len(lora_b)} LoRA-B tensors"
            )
        for number, (part, a, b) in enumerate(zip(self.slices, lora_a, lora_b, strict=True)):
            if a is None and b is None:
                continue
            fault = self.refusals.get(part.module) or find_pair_fault(a, b)
            if (source := self.source(number)) != number:
                fault = (
                    "a checkpoint has no weight of this module here, its rows are those of "
                    f"{self.modules[source]}"
                )
            if not fault and a is not None and b is not None:
                fault = find_rank_fault(len(a), max_rank)
                fault = fault or find_shape_fault(a, b, columns, part.rows)
            if fault:
                raise PlanError(f"module {part.module} of {self.fused}: {fault}")


def build_plan(
    fused: str,
    modules: Sequence[str],
    groups: Sequence[Sequence[int]],
    outputs: Sequence[Output],
) -> FusionPlan:
    """Build the plan of one fused projection for one rank.

    Args:
        fused: the projection's own name.
        modules: its adapter-visible modules.
        groups: per module, the indices of the outputs that it covers.
        outputs: the projection's outputs, as the layer's own weight loader places them.

    Raises:
        PlanError: the modules' runs are not contiguous, not in order, or overlap.
    """
    if [i for group in groups for i in group] != list(range(len(outputs))):
        raise PlanError(
            f"{fused}: modules {', '.join(modules)} cover the outputs {[list(g) for g in groups]}, "
            f"which is not each of the {len(outputs)} outputs once and in order"
        )
    runs = [
        _locate(fused, name, [outputs[i] for i in group])
        for name, group in zip(modules, groups, strict=True)
    ]
    width = len(outputs[0].column)
    starts = [start for start, _ in runs]
    stops = [start + len(local) for start, local in runs]
    if any(stop > start for stop, start in zip(stops, starts[1:], strict=False)):
        raise PlanError(
            f"{fused}: its weight loader places the modules {', '.join(modules)} at "
            f"{list(zip(starts, stops, strict=True))}, which overlap or are out of order"
        )
    # vLLM's kernels write the slices one after another without gaps (`add_expand`), so columns
    # of no module belong to the slice before them, and the first columns to the first slice.
    bounds = [0, *starts[1:], width]
    slices = [
        Slice(
            module=name,
            rows=sum(outputs[i].rows for i in group),
            width=bounds[n + 1] - bounds[n],
            offset=start - bounds[n],
            local=local,
        )
        for n, (name, group, (start, local)) in enumerate(zip(modules, groups, runs, strict=True))
    ]
    return FusionPlan(fused, tuple(slices))


def build_traced_plan(
    fused: str, modules: Sequence[str], held: Mapping[str, Held], regions: Sequence[slice] = ()
) -> FusionPlan:
    """Build the plan of one fused projection from the trace of its modules.

    Args:
        fused: the projection's own name.
        modules: its adapter-visible modules.
        held: module -> what the projection's weight holds of it on this rank.
        regions: per module, its part of the weight's rows, if each module has one output. A region
            may be filled by another module. By default a region is where its module's rows are.

    Raises:
        PlanError: a region is filled by no module or by several, or a module's rows or columns have
            an order that slices cannot describe.
    """
    for module, part in held.items():
        if not torch.equal(part.columns, torch.arange(len(part.columns))):
            raise PlanError(f"{fused}: its model reorders the columns of {module}")
    filled = {module: part.rows >= 0 for module, part in held.items()}
    regions = regions or [_find_region(fused, module, filled) for module in modules]
    width = len(next(iter(held.values())).rows)
    bounds = [0, *(region.start for region in regions[1:]), width]
    sources, slices, covered = [], [], torch.zeros(width, dtype=torch.bool)
    for number, (module, region) in enumerate(zip(modules, regions, strict=True)):
        owners = [name for name in filled if bool(filled[name][region].any())]
        if len(owners) > 1 and module in owners:
            # A model that loads another module's weight here too has no weight of this one.
            owners.remove(module)
        if len(owners) != 1 or not bool(filled[owners[0]][region].all()):
            raise PlanError(
                f"{fused}: its model loads {', '.join(owners) or 'nothing'} into the rows of {module} "
                f"({region.start} to {region.stop} of this rank's weight)"
            )
        if (
            bool(covered[region].any())
            or region.start < bounds[number]
            or region.stop > bounds[number + 1]
        ):
            raise PlanError(f"{fused}: the rows of {module} overlap others or are out of order")
        covered[region] = True
        sources.append(modules.index(owners[0]))
        slices.append(
            Slice(
                module=module,
                rows=held[owners[0]].size,
                width=bounds[number + 1] - bounds[number],
                offset=region.start - bounds[number],
                local=held[owners[0]].rows[region],
            )
        )
    stray = [name for name in filled if bool((filled[name] & ~covered).any())]
    if stray:
        raise PlanError(f"{fused}: its model loads {', '.join(stray)} outside of the modules' rows")
    return FusionPlan(
        fused, tuple(slices), sources=() if sources == list(range(len(modules))) else tuple(sources)
    )


def _find_region(fused: str, module: str, filled: Mapping[str, torch.Tensor]) -> slice:
    where = torch.nonzero(filled[module]).flatten() if module in filled else torch.empty(0)
    if not len(where) or int(where[-1]) - int(where[0]) + 1 != len(where):
        raise PlanError(f"{fused}: its model does not load {module} into one run of rows")
    return slice(int(where[0]), int(where[-1]) + 1)


def refuse_all(fused: str, modules: Sequence[str], width: int, reason: str) -> FusionPlan:
    """Build a plan that accepts no adapter, for a layer that can only serve the base model.

    Its slices divide ``width`` evenly. They exist because vLLM's warm-up sets every slot to zeros.
    """
    bounds = [width * n // len(modules) for n in range(len(modules) + 1)]
    slices = tuple(
        Slice(
            name, rows=stop - start, width=stop - start, offset=0, local=torch.arange(stop - start)
        )
        for name, start, stop in zip(modules, bounds, bounds[1:], strict=False)
    )
    return FusionPlan(fused, slices, refusals=dict.fromkeys(modules, reason))


def _locate(fused: str, module: str, outputs: Sequence[Output]) -> tuple[int, torch.Tensor]:
    """Return the start of a module's run on this rank, and its rows in the run's order."""
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
