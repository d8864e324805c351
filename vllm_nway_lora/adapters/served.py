# SPDX-License-Identifier: Apache-2.0
"""Read from a model's LoRA layers which modules, fused layers and parts an adapter can name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_nway_lora.adapters.fit import module_shapes
from vllm_nway_lora.adapters.target import Part, Target
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.models import tables
from vllm_nway_lora.models.names import checkpoint_names
from vllm_nway_lora.models.transformers_names import Conversion
from vllm_nway_lora.rows.errors import PlanError
from vllm_nway_lora.rows.notes import get_notes
from vllm_nway_lora.rows.probe import list_shards, read_outputs

#: Letters that stand for outputs in names such as ``in_proj_qkv``.
_LETTERS = frozenset("abgkqvz")

#: Words that do in names such as ``gate_up_proj`` and ``query_key_value``.
_WORDS = frozenset({"gate", "up", "q", "k", "v", "query", "key", "value"})

_TARGET = "_nway_lora_target"


def read_target(manager: Any) -> Target:
    """Return what the LoRA layers of a ``LoRAModelManager`` take; it is read once.

    Args:
        manager: the rank's ``LoRAModelManager``.
    """
    target: Target | None = vars(manager).get(_TARGET)
    if target is None:
        target = _read(manager)
        setattr(manager, _TARGET, target)
    return target


def _read(manager: Any) -> Target:
    rows: dict[str, int | None] = {}
    columns: dict[str, int | None] = {}
    fused: dict[str, tuple[str, ...]] = {}
    outputs: dict[str, list[tuple[int, int]]] = {}
    mixtures = []
    for path, layer in manager.modules.items():
        if isinstance(layer, FusedMoEWithLoRA):
            mixtures.append(path)
            continue
        modules = list(manager.packed_modules.get(path, ())) or [path]
        shapes = _shapes(manager, path, layer, len(modules))
        for module, (width, height) in zip(modules, shapes, strict=True):
            rows[module], columns[module] = height, width
        if path not in modules and all(height for _, height in shapes):
            fused[path] = tuple(modules)
        outputs |= _outputs(layer, modules)
    # A class can leave an entry out of its instance's mapping because LoRA is on (Qwen3.5, 0.18 to 0.20).
    declared = getattr(type(manager.model), "packed_modules_mapping", None) or {}
    for path in list(rows):
        parent = path.rpartition(".")[0]
        for name, names in {**declared, **manager.packed_modules_mapping}.items():
            of = tuple(f"{parent}.{module}" for module in names)
            if len(of) > 1 and of[0] == path and all(rows.get(module) for module in of):
                fused.setdefault(f"{parent}.{name}", of)
    parts = {}
    for module, places in outputs.items():
        for name, (start, stop) in zip(_part_names(module, len(places)), places, strict=False):
            if name and name not in rows and rows.get(module) is not None:
                parts[name] = Part(module, start, stop)
    layers = dict(manager.model.named_modules())
    absent = tuple(
        path
        for path, layer in layers.items()
        if type(layer).__name__ in ("PPMissingLayer", "StageMissingLayer")
    )
    unwrapped = set()
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)) or name == "base_layer":
            continue
        names = manager.packed_modules_mapping.get(name) or [name]
        unwrapped |= {path, *(f"{parent}.{module}" for module in names)}
    return Target(
        rows,
        columns,
        fused,
        parts,
        frozenset(mixtures),
        absent,
        frozenset(unwrapped - rows.keys() - fused.keys() - parts.keys()),
        _read_aliases(manager.model, [*rows, *fused, *mixtures, *sorted(unwrapped)]),
    )


def _shapes(
    manager: Any, path: str, layer: Any, modules: int
) -> Sequence[tuple[int | None, int | None]]:
    """Return per module the columns of LoRA-A and the rows of LoRA-B, over all ranks."""
    if not isinstance(layer, NWayLinearWithLoRA):
        shapes = module_shapes(manager, path, layer, modules)
        return shapes if len(shapes) == modules else [(None, None)] * modules
    plan = layer.plan
    if plan.trained != plan.modules:  # a module's rows are another module's too (Gemma 4)
        return [(layer.input_size, None)] * modules
    return [(layer.input_size, part.rows) for part in plan.slices]


def _outputs(layer: Any, modules: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Return per module of several outputs the rows of each, if the model keeps their order."""
    base: Any = getattr(layer, "base_layer", None)
    traced = get_notes(base).traced or {}
    own = [module.rpartition(".")[2] for module in modules]
    try:
        if not traced or len(list_shards(base)) <= len(modules):
            return {}
        placed = read_outputs(base)
    except (AttributeError, PlanError):  # a layer of one output, or with a loader of its own
        return {}
    groups = tables.outputs_by_module(base.prefix.rpartition(".")[2], own, len(placed)) or ()
    found = {}
    for module, name, group in zip(modules, own, groups, strict=False):
        places: list[tuple[int, int]] = []
        expected = torch.full_like(placed[0].column, -1)
        for number in group:
            start = places[-1][1] if places else 0
            column = placed[number].column
            expected[column >= 0] = column[column >= 0] + start
            places.append((start, start + placed[number].rows))
        if len(places) > 1 and name in traced and torch.equal(traced[name].rows, expected):
            found[module] = places
    return found


def _part_names(module: str, parts: int) -> list[str]:
    """Return the paths that modules of one output each would have in place of ``module``.

    They follow from its name: ``in_proj_qkv`` of 3 outputs has ``in_proj_q``, ``in_proj_k`` and
    ``in_proj_v``, ``gate_up_proj`` has ``gate_proj`` and ``up_proj``. Empty if its name has no such
    parts.
    """
    parent, dot, name = module.rpartition(".")
    names = list(tables.PARTS.get((name, parts), ()))
    if not names:
        words = name.split("_")
        for number, word in enumerate(words):
            # Names such as Wqkv have the letters behind a W.
            head, letters = ("W", word[1:]) if word.startswith("W") else ("", word)
            if set(letters) <= _LETTERS and len(letters) == parts == len(set(letters)):
                names = [
                    "_".join([*words[:number], head + letter, *words[number + 1 :]])
                    for letter in letters
                ]
                break
        else:
            if set(words[:parts]) <= _WORDS:
                names = ["_".join([word, *words[parts:]]) for word in words[:parts]]
    return [f"{parent}{dot}{name}" if name else "" for name in names]


def _read_aliases(model: Any, paths: Sequence[str]) -> dict[str, str]:
    """Return transformers' names of modules and layers, each of which one path has."""
    conversion = Conversion(model)
    found: dict[str, set[str]] = {}
    for path in paths:
        for name in checkpoint_names(model, path):
            for alias in conversion.rename(name):
                found.setdefault(alias, set()).add(path)
    return {alias: next(iter(of)) for alias, of in found.items() if len(of) == 1}
