"""One word per layer and adapter-visible module of a model on one rank, as ``ci/audit.py`` lists them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.linear import LinearBase

from support.mixtures import find_mixtures
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.layers.classes import layer_classes
from vllm_nway_lora.layers.traced_experts import find_difference
from vllm_nway_lora.models import traced
from vllm_nway_lora.rows.held import Held
from vllm_nway_lora.rows.notes import get_notes
from vllm_nway_lora.rows.recorder import fold

MAX_RANK = 8
#: Between the words of layers that share a line.
BETWEEN = " and also "
Words = dict[str, str]


def audit_rank(folder: str, number: int, size: int) -> Words:
    """Build and wrap a model on one rank; return ``layer: module`` -> its word.

    Layers that differ in the numbers of their paths only, and have the same words, are one line.
    """
    options = ServerOptions(tensor_parallel_size=size, max_lora_rank=MAX_RANK)
    rank = offline.configure(folder, number, options)
    try:
        offline.build(rank)
    except NotImplementedError:  # its constructor reads a value
        rank = offline.configure(folder, number, options)
        offline.build(rank, "cpu")
    mixtures = find_mixtures(rank.model)
    layers = {
        path: layer for path, layer in rank.model.named_modules() if isinstance(layer, LinearBase)
    }
    with _listening() as reasons:
        rank.wrap()
    manager = rank.lora_manager
    found: dict[str, set[str]] = {}
    for path, mixture in mixtures.items():
        reason = reasons.get(f"{path}.routed_experts", reasons.get(path, ""))
        for module, word in judge_experts(mixture, manager.modules.get(path), reason).items():
            found.setdefault(f"{fold(path)}: {module}", set()).add(fold(word))
    with rank.current():
        for path, layer in layers.items():
            name = path.rpartition(".")[2]
            modules = list(manager.packed_modules_mapping.get(name) or [name])
            lora_layer = manager.modules.get(path)
            for module, word in judge(layer, lora_layer, modules, reasons.get(path, "")).items():
                found.setdefault(f"{fold(path)}: {module}", set()).add(fold(word))
    return {line: BETWEEN.join(sorted(words)) for line, words in sorted(found.items())}


def judge_experts(layer: Any, lora_layer: Any, reason: str = "") -> Words:
    """Return module -> the word for LoRA on it, of a mixture of experts.

    Args:
        layer: the layer that vLLM's LoRA layer replaces.
        lora_layer: its LoRA layer; None if it has none.
        reason: why the mixture could not be traced.
    """
    notes = get_notes(layer)
    if notes.refusals:
        return {module: f"refused: {text}" for module, text in notes.refusals.items()}
    if lora_layer is None:
        return {"experts": "no LoRA"}
    if notes.mixture is None:
        return {"experts": f"by table: {reason}"[:100] if reason else "by table"}
    try:
        difference = find_difference(lora_layer, notes.mixture)
    except Exception as error:  # other sizes than the trace's
        return dict.fromkeys(notes.mixture.kinds, f"by table: {error}"[:100])
    word = f"DIFFERS: {difference}" if difference else "exact"
    return dict.fromkeys(notes.mixture.kinds, word)


def judge(layer: Any, lora_layer: Any, modules: Sequence[str], reason: str = "") -> Words:
    """Return module -> the word for LoRA on it.

    Args:
        layer: the base layer.
        lora_layer: its LoRA layer; None if it has none.
        modules: its adapter-visible modules.
        reason: why the layer could not be traced.
    """
    notes = get_notes(layer)
    plan = getattr(lora_layer, "plan", None)
    refusals = {**(plan.refusals if plan else {}), **notes.refusals}
    words = {module: f"refused: {refusals[module]}" for module in modules if module in refusals}
    rest = [module for module in modules if module not in words]
    if lora_layer is None:
        return words | dict.fromkeys(rest, "no LoRA")
    if notes.traced is None:
        word = f"by table: {reason}"[:100] if reason else "by table"
        return words | dict.fromkeys(rest, word)
    # Where another module's weight fills a module's rows too, no checkpoint has the latter's.
    trained = plan.trained if plan else modules
    held = {name: part for name, part in notes.traced.items() if name in trained}
    word = "ours" if isinstance(lora_layer, layer_classes()) else "exact"
    if words:
        # Slots of a plan that refuses modules hold nothing of them.
        return words | dict.fromkeys(rest, f"{word}, not compared")
    differences = compare_slots(lora_layer, modules, held)
    for module in modules:
        if module not in held:
            words[module] = "no weight"
        elif differences[module]:
            words[module] = f"DIFFERS: {differences[module]}"
        else:
            words[module] = word
    return words


def compare_slots(
    lora_layer: Any, modules: Sequence[str], held: Mapping[str, Held]
) -> dict[str, str]:
    """Write numbers into a slot of a LoRA layer, and return per module where they differ from the trace.

    Args:
        lora_layer: vLLM's LoRA layer or this package's.
        modules: its adapter-visible modules.
        held: module -> what the base layer's weight holds of it on this rank.
    """
    columns = lora_layer.base_layer.input_size
    lora_a: list[Any] = []
    lora_b: list[Any] = []
    starts: dict[str, tuple[int, int]] = {}
    rows = 1
    for number, module in enumerate(modules):
        part = held.get(module)
        starts[module] = number * columns + 1, rows
        a, b = torch.zeros(MAX_RANK, columns), torch.zeros(part.size if part else 0, MAX_RANK)
        a[0] = torch.arange(columns) + starts[module][0]
        b[:, 0] = torch.arange(len(b)) + rows
        rows += len(b)
        lora_a.append(a if part else None)
        lora_b.append(b if part else None)
    try:
        if len(modules) == 1:
            lora_layer.set_lora(0, lora_a[0], lora_b[0])
        else:
            lora_layer.set_lora(0, lora_a, lora_b)
    except Exception as error:
        return dict.fromkeys(held, f"{type(error).__name__}: {error}"[:200])
    slots_a = [stacked[0, 0, 0].long() for stacked in lora_layer.lora_a_stacked]
    slots_b = [stacked[0, 0, :, 0].long() for stacked in lora_layer.lora_b_stacked]
    written = torch.cat(slots_b)
    found = {}
    for module, part in held.items():
        first_column, first_row = starts[module]
        is_own = (written >= first_row) & (written < first_row + part.size)
        got = torch.where(is_own, written - first_row, -1)
        width = max(len(got), len(part.rows))
        pad = torch.nn.functional.pad
        same_rows = torch.equal(
            pad(got, (0, width - len(got)), value=-1),
            pad(part.rows, (0, width - len(part.rows)), value=-1),
        )
        same_columns = all(
            torch.equal(a - first_column, part.columns)
            for a, b in zip(slots_a, slots_b)
            if bool(((b >= first_row) & (b < first_row + part.size)).any())
        )
        found[module] = "its columns" if not same_columns else "" if same_rows else "its rows"
    return found


@contextlib.contextmanager
def _listening() -> Iterator[dict[str, str]]:
    """Collect why layers, or all layers, are not traced: the log's words, and the faults of modules."""
    reasons: dict[str, str] = _Reasons()
    trace_modules = traced.trace_modules

    def trace(twin: Any, shapes: Any) -> Any:
        found = trace_modules(twin, shapes)
        for name, result in found.items():
            if result.fault:
                reasons.faults[name] = result.fault
        return found

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            args = record.args if isinstance(record.args, tuple) else ()
            if "is not traced" in str(record.msg):
                reasons[args[0]] = str(args[1])
            elif "cannot trace" in str(record.msg):
                reasons.all = f"{args[1]}: {args[2]}"

    logger = logging.getLogger("vllm.nway_lora")
    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with mock.patch.object(traced, "trace_modules", trace):
            yield reasons
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Reasons(dict):
    """Path -> reason; a reason for all layers stands for the rest, and faults of modules after it."""

    all = ""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, str] = {}

    def get(self, path: str, default: str = "") -> str:
        if path in self:
            return self[path]
        if self.all:
            return self.all
        parent = path.rpartition(".")[0]
        of = {f for n, f in self.faults.items() if n.rpartition(".")[0].endswith(parent)}
        return sorted(of)[0] if of else default
