# SPDX-License-Identifier: Apache-2.0
"""What an adapter, or any adapter, meets on a model served by this vLLM: stock and plugin.

Nothing is predicted from a table: vLLM's own manager wraps the model's own class on each rank (see
:mod:`vllm_nway_lora.offline`), loads the adapter and fills its slots, once without the plugin and
once with it. LoRA-B holds the numbers of its rows then, so what a layer has done with it shows.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.request import LoRARequest

import vllm_nway_lora
from vllm_nway_lora import fusions, offline
from vllm_nway_lora.admission import check as findings_of
from vllm_nway_lora.fit import given_to, problems_of
from vllm_nway_lora.plan import FusionPlan, PlanError

EXACT, WRONG, IGNORED, REFUSED, FAILS = "exact", "wrong", "ignored", "refused", "fails"
_WORST_FIRST = (FAILS, WRONG, IGNORED, REFUSED, EXACT)


@dataclass
class Verdict:
    """How one side serves an adapter's part of one layer; the worst of all ranks.

    Attributes:
        word: ``exact``, ``wrong`` (other numbers, no message), ``ignored`` (base numbers), ``refused``
            or ``fails`` (the engine does not start).
        reason: the error's text, or what is wrong.
    """

    word: str = EXACT
    reason: str = ""

    def worsen(self, word: str, reason: str = "") -> None:
        """Take another rank's verdict if it is worse."""
        if _WORST_FIRST.index(word) < _WORST_FIRST.index(self.word):
            self.word, self.reason = word, reason


@dataclass
class Row:
    """One layer that an adapter has modules for.

    Attributes:
        layer: its path in vLLM's model; in a folded row, numbers are ``*``.
        modules: adapter-visible modules -> rows of LoRA-B over all ranks; None where not adapted.
        rank: LoRA's r, the largest of its modules.
        plan: how its slices lie on each rank, rank by rank; empty for layers that are vLLM's own.
        stock: how vLLM without the plugin serves it.
        plugin: how vLLM with the plugin serves it.
        count: how many layers the row stands for.
    """

    layer: str
    modules: dict[str, int | None]
    rank: int
    plan: list[FusionPlan] = field(default_factory=list)
    stock: Verdict = field(default_factory=Verdict)
    plugin: Verdict = field(default_factory=Verdict)
    count: int = 1


@dataclass
class Report:
    """What :func:`check` found; ``stock`` and ``plugin`` are of the adapter as a whole."""

    rows: list[Row]
    stock: Verdict
    plugin: Verdict


def check(
    model: str,
    adapter: str,
    *,
    tensor_parallel_size: int = 1,
    fully_sharded: bool = False,
    max_lora_rank: int | None = None,
    model_impl: str = "auto",
) -> Report:
    """Return what serving ``adapter`` on ``model`` comes to, without reading a weight of either.

    Args:
        model: a local folder with ``config.json``.
        adapter: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``, of
            which the header alone is read.
        tensor_parallel_size: ``--tensor-parallel-size``.
        fully_sharded: ``--fully-sharded-loras``.
        max_lora_rank: ``--max-lora-rank``; by default the smallest that vLLM takes for the adapter.
        model_impl: ``--model-impl``.

    Raises:
        FileNotFoundError: the adapter's folder lacks a file.
    """
    rank = max_lora_rank or _round_rank(
        json.loads(Path(adapter, "adapter_config.json").read_text())
    )
    rows: dict[str, Row] = {}
    whole = {True: Verdict(), False: Verdict()}
    with empty_twin(Path(adapter)) as twin:
        for plugin, here in _ranks(
            model,
            tensor_parallel_size,
            whole,
            fully_sharded=fully_sharded,
            max_lora_rank=rank,
            model_impl=model_impl,
        ):
            _check_rank(here, twin, plugin, rows, whole[plugin])
    return _report(rows, whole)


def _ranks(
    model: str, size: int, whole: Mapping[bool, Verdict], **options: Any
) -> Iterator[tuple[bool, offline.Rank]]:
    """Yield every rank with its model wrapped, made current, with the plugin on and then off.

    With the plugin first, because its plans say where a module's rows belong. A rank that cannot
    be built worsens the verdict of its side.
    """
    for plugin, verdict in whole.items():
        _switch(plugin)
        for number in range(size):
            here = offline.configure(model, number, size, **options)
            try:
                offline.build(here)
                here.wrap()
                here.warm_up()
            except Exception as error:
                verdict.worsen(FAILS, _say(error))
                continue
            with here.current():
                yield plugin, here
    _switch(False)


def _report(rows: Mapping[str, Row], whole: Mapping[bool, Verdict]) -> Report:
    found = fold(rows.values())
    for plugin, verdict in whole.items():
        for row in found:
            part = row.plugin if plugin else row.stock
            verdict.worsen(part.word, part.reason)
            if verdict.word == FAILS:
                part.worsen(FAILS, verdict.reason)
    return Report(found, whole[False], whole[True])


def plan(
    model: str,
    *,
    tensor_parallel_size: int = 1,
    fully_sharded: bool = False,
    model_impl: str = "auto",
) -> Report:
    """Return which projections of ``model`` are fused, and what adapters on them come to.

    A row's verdicts are the worst over adapters on all of its modules and on each one alone.
    Arguments are those of :func:`check`.
    """
    rows: dict[str, Row] = {}
    whole = {True: Verdict(), False: Verdict()}
    for plugin, here in _ranks(
        model, tensor_parallel_size, whole, fully_sharded=fully_sharded, model_impl=model_impl
    ):
        if plugin:
            _plan_rank(here.lora_manager, rows)
        else:
            _try_stock(here.lora_manager, here.group.rank, rows)
    return _report(rows, whole)


def _plan_rank(manager: Any, rows: dict[str, Row]) -> None:
    for name, layer in manager.modules.items():
        found: FusionPlan | None = getattr(layer, "plan", None)
        own = name.rpartition(".")[2]
        packed = manager.packed_modules_mapping.get(own, [])
        if found is None and not packed:
            continue
        modules: dict[str, int | None] = dict.fromkeys(packed or [own])
        if found is not None and not found.by_rows:
            modules = {part.module: part.rows for part in found.slices}
        row = rows.setdefault(name, Row(name, modules, 0))
        if found is not None:
            row.plan.append(found)
            for reason in found.refusals.values():
                row.plugin.worsen(REFUSED, reason)


def _try_stock(manager: Any, rank: int, rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        layer = manager.modules.get(name)
        own = name.rpartition(".")[2]
        packed, modules = list(manager.packed_modules_mapping.get(own) or [own]), list(row.modules)
        if packed != modules and (layer is not None or not set(packed) >= set(modules)):
            row.stock.worsen(REFUSED, "its class does not list these modules as parts of it")
            for module in (_names_taken(manager) & set(modules)) - set(packed):
                row.stock.worsen(IGNORED, f"{module} is a name that other layers have, too")
            continue
        if layer is None or _renamed_unknown(manager.model):
            row.stock.worsen(IGNORED, "no LoRA layer takes it, and no error says so")
            continue
        if not row.plan or row.plan[0].by_rows:
            continue
        for reason in row.plan[rank].refusals.values():
            row.stock.worsen(IGNORED, reason)
        if row.plan[rank].refusals:
            continue
        for adapted in [modules, *([module] for module in modules)]:
            given = [
                (f"{name.rpartition('.')[0]}.{module}", _one_row(layer, rows_of))
                if module in adapted
                else (module, None)
                for module, rows_of in row.modules.items()
            ]
            row.stock.worsen(*_stock_verdict(layer, row.plan[rank], given, []))


def _names_taken(manager: Any) -> set[str]:
    """Return the module names that vLLM does not refuse, wherever in the model an adapter has them.

    As ``_load_adapter`` in vllm/lora/worker_manager.py puts them together, 0.17.0 to 0.33.0.
    """
    names: set[str] = set()
    for name in manager.supported_lora_modules:
        names.update(manager.packed_modules_mapping.get(name) or [name])
    return names


def _renamed_unknown(model: Any) -> bool:
    """Tell whether vLLM looks for the modules of ``model`` by names that its checkpoints lack."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = fusions.RENAMES.get(type(model).__name__, {})
    return any(old not in getattr(mapper, "orig_to_new_substr", {}) for old in renames)


def _one_row(layer: Any, rows: int | None) -> Any:
    """Make the tensors of a module at LoRA rank 1."""
    assert rows is not None
    return SimpleNamespace(lora_a=torch.zeros(1, layer.input_size), lora_b=torch.zeros(rows, 1))


def _switch(plugin: bool) -> None:
    vllm_nway_lora.unregister()
    if plugin:
        vllm_nway_lora.register()


def _check_rank(
    here: offline.Rank, twin: Path, plugin: bool, rows: dict[str, Row], whole: Verdict
) -> None:
    manager = here.lora_manager
    load = type(here.worker_manager)._load_adapter
    load = getattr(load, "__wrapped__", load)  # vLLM's own: what admission says is asked below
    try:
        adapter = load(here.worker_manager, LoRARequest("adapter", 1, str(twin)))
    except Exception as error:
        whole.worsen(REFUSED, _say(error))
        return
    taken: set[int] = set()
    for name, layer in manager.modules.items():
        given = given_to(manager, adapter, name, layer)
        if not any(weights for _, weights in given):
            continue
        taken |= {id(weights) for _, weights in given if weights}
        row = rows.setdefault(name, _row(name, given))
        verdict = row.plugin if plugin else row.stock
        problems = problems_of(manager, name, layer, given)
        if plugin:
            if problems:
                verdict.worsen(REFUSED, problems[0])
            if hasattr(layer, "plan"):
                row.plan.append(layer.plan)
        else:
            plan = row.plan[here.group.rank] if row.plan else None
            verdict.worsen(*_stock_verdict(layer, plan, given, problems))
    # Experts are not looked at (see `offline`).
    rest = {n: w for n, w in adapter.loras.items() if id(w) not in taken and ".experts" not in n}
    if plugin:
        found = findings_of(manager, adapter)
        for problem in [*found.problems, *found.unmatched]:
            if ".experts" not in problem:
                whole.worsen(REFUSED, problem)
    for name, weights in rest.items():
        row = rows.setdefault(name, _row(name, [(name, weights)]))
        if plugin:
            row.plugin.worsen(REFUSED, "no layer of this model takes it")
        else:
            row.stock.worsen(IGNORED, "no LoRA layer takes it, and no error says so")


def _row(name: str, given: list[tuple[str, Any]]) -> Row:
    modules = {
        module.rpartition(".")[2]: None if w is None or w.lora_b is None else int(w.lora_b.shape[0])
        for module, w in given
    }
    ranks = [w.lora_a.shape[0] for _, w in given if w is not None and w.lora_a is not None]
    return Row(name, modules, max(ranks, default=0))


def _stock_verdict(
    layer: Any, plan: FusionPlan | None, given: list[tuple[str, Any]], problems: list[str]
) -> tuple[str, str]:
    """Set the layer's slot as vLLM would, LoRA-B being the numbers of its rows, and look at it."""
    pairs = []
    for _, weights in given:
        if weights is None or weights.lora_a is None or weights.lora_b is None:
            pairs.append((None, None))
            continue
        a, b = torch.zeros_like(weights.lora_a), torch.zeros_like(weights.lora_b)
        a[:1] = 1.0
        if b.ndim == 2:
            b[:, :1] = torch.arange(1.0, len(b) + 1).unsqueeze(1)
        pairs.append((a, b))
    lora_a, lora_b = [a for a, _ in pairs], [b for _, b in pairs]
    try:
        if len(given) == 1:
            layer.set_lora(0, lora_a[0], lora_b[0])
        else:
            layer.set_lora(0, lora_a, lora_b)
    except Exception as error:
        return REFUSED, _say(error)
    if plan is None:
        return (WRONG, problems[0]) if problems else (EXACT, "")
    held = torch.cat([b[0, 0, :, 0] for b in layer.lora_b_stacked])
    layer.reset_lora(0)
    try:
        expected = _expected(plan, lora_b)
    except PlanError as error:
        return WRONG, str(error)
    if torch.equal(held[: len(expected)], expected):
        return EXACT, ""
    return WRONG, "LoRA-B's rows are not those that the base weight has on this rank"


def _expected(plan: FusionPlan, lora_b: list[torch.Tensor | None]) -> torch.Tensor:
    """Return the rows that this rank's output should have, by number from 1; 0 for none."""
    slices = [torch.zeros(part.width) for part in plan.slices]
    for module, number, rows in plan.assign([None if b is None else len(b) for b in lora_b]):
        b = lora_b[module]
        assert b is not None
        part = plan.slices[number]
        slices[number][part.run] = part.take(b[rows])[:, 0]
    return torch.cat(slices)


def fold(rows: Any) -> list[Row]:
    """Make one row of the rows that differ in the layer's number alone."""
    folded: dict[Any, Row] = {}
    for row in rows:
        pattern = re.sub(r"\b\d+\b", "*", row.layer)
        key = (pattern, tuple(row.modules.items()), row.rank, row.stock.word, row.plugin.word)
        if key in folded:
            folded[key].count += 1
        else:
            row.layer = pattern
            folded[key] = row
    return list(folded.values())


def _round_rank(config: Mapping[str, Any]) -> int:
    """Return the smallest ``--max-lora-rank`` of vLLM's that holds the adapter's ranks."""
    ranks = [int(config.get("r", 8)), *(config.get("rank_pattern") or {}).values()]
    return next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= max(ranks)), max(ranks))


@contextmanager
def empty_twin(adapter: Path) -> Iterator[Path]:
    """Make an adapter with the same configuration and names, shapes and types, and only zeros.

    Its file of tensors is sparse: it has the other's header, and no data on the disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = adapter / "adapter_model.safetensors"
        with source.open("rb") as file:
            length = file.read(8)
            header = length + file.read(struct.unpack("<Q", length)[0])
        twin = Path(folder) / source.name
        twin.write_bytes(header)
        os.truncate(twin, source.stat().st_size)
        config = "adapter_config.json"
        (Path(folder) / config).write_text((adapter / config).read_text())
        yield Path(folder)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
