# SPDX-License-Identifier: Apache-2.0
"""Trace a model's mixtures of experts, and note on each what its weights hold of which module."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from vllm_nway_lora.models.names import checkpoint_names
from vllm_nway_lora.rows.codes import ChangedError
from vllm_nway_lora.rows.experts import HeldExperts, record_shapes, sign, trace_mixture
from vllm_nway_lora.rows.notes import get_notes, set_notes
from vllm_nway_lora.rows.recorder import TraceError, fold

logger = logging.getLogger("vllm.nway_lora")

_WEIGHTS = ("w13_weight", "w2_weight")
_INNER = ".routed_experts"  # the layer with the weights, in newer releases
_CHANGED = (
    "its model changes the values of its experts' weights while it loads them, so that LoRA's product "
    "is no addition to them"
)
#: The number of mixtures that are compared in one load: what reaches the loaders takes memory.
_AT_ONCE = 16
#: The names under which an adapter's modules reach a mixture that stacks its experts.
STACKED = ("base_layer", "experts")


class _Asked(NamedTuple):
    """What is asked of the mixtures of a pattern.

    Attributes:
        modules: the modules' names below the mixture's parent, expert by expert; none if stacked.
        kinds: as for :class:`HeldExperts`.
        shapes: as for :class:`HeldExperts`.
        stack: as for ``trace_mixture``.
    """

    modules: Sequence[str]
    kinds: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    stack: int = 0


def trace_experts(
    model: nn.Module, twin: nn.Module, mapping: Mapping[str, Sequence[str]]
) -> list[str]:
    """Note what the mixtures hold; return the folded paths of those that could not be traced.

    One mixture of each pattern is numbered. Of the others the first and the last expert are passed
    without numbers, which shows whether they load alike.

    Args:
        model: the built model, not wrapped for LoRA yet.
        twin: its class, built on the meta device for this rank and without quantisation.
        mapping: fused projection's name -> its adapter-visible modules.
    """
    by_table: dict[str, None] = {}
    patterns: dict[tuple[Any, ...], list[str]] = {}
    for path, weights in _find(model, twin):
        shapes = [tuple(weight.shape) for weight in weights]
        patterns.setdefault((fold(path), *shapes), []).append(path)
    for pattern, paths in patterns.items():
        kinds: Sequence[str] = ()
        try:
            asked = _ask(model, twin, paths[0], mapping)
            if asked is None:
                continue
            kinds = asked.kinds
            mixture, candidate = _trace(model, twin, paths[0], asked)
            alike = _find_alike(model, twin, paths, asked, mixture, candidate)
        except ChangedError:
            for path in paths:
                refuse(_noted(model, path), kinds, _CHANGED)
        except Exception as error:  # any loader, also of other packages
            logger.debug("%s is not traced: %s", paths[0], error)
            by_table[pattern[0].removesuffix(_INNER)] = None
        else:
            for path in alike:
                set_notes(_noted(model, path), mixture=mixture)
            if len(alike) < len(paths):
                by_table[pattern[0].removesuffix(_INNER)] = None
    return list(by_table)


def refuse(layer: Any, kinds: Sequence[str], reason: str) -> None:
    """Note on a mixture that no LoRA on its experts can be served."""
    known = get_notes(layer).refusals
    set_notes(layer, refusals={**dict.fromkeys((*kinds, *STACKED), reason), **known})


def _find(model: nn.Module, twin: nn.Module) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the path and both weights of the twin's mixtures that the model has too."""
    layers = dict(model.named_modules())
    for path, layer in twin.named_modules():
        weights = tuple(getattr(layer, name, None) for name in _WEIGHTS)
        if type(layers.get(path)) is not type(layer):
            continue
        if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights):
            yield path, (weights[0], weights[1])


def _noted(model: nn.Module, path: str) -> nn.Module:
    """Return the layer that vLLM's LoRA layer replaces, given the path of the one with the weights."""
    return model.get_submodule(path.removesuffix(_INNER))


def _ask(
    model: nn.Module, twin: nn.Module, path: str, mapping: Mapping[str, Sequence[str]]
) -> _Asked | None:
    """Return what to ask of a mixture; None if vLLM has no LoRA on it.

    Raises:
        TraceError: adapters have no module per expert and projection.
    """
    layer: Any = twin.get_submodule(path)
    config = getattr(getattr(layer, "moe_config", None), "moe_parallel_config", layer)
    hidden, intermediate = layer.w13_weight.shape[2], layer.w2_weight.shape[2] * config.tp_size
    modules = mapping.get(path.removesuffix(_INNER).rpartition(".")[2], ())
    if modules:
        found = [re.fullmatch(r"(?:.*\.)?experts\.(\d+)\.(\w+)", module) for module in modules]
        experts = [match and int(match[1]) for match in found]
        kinds = [match[2] for match in found[: experts.count(0)] if match]
        in_order = [number // max(1, len(kinds)) for number in range(len(modules))]
        if len(kinds) not in (2, 3) or experts != in_order:
            raise TraceError(f"its modules are not two or three per expert: {modules[:4]}")
        shapes = [(intermediate, hidden)] * len(kinds)
        shapes[1] = (hidden, intermediate)
        return _Asked(modules, kinds, shapes)
    if not getattr(model, "is_3d_moe_weight", False):
        return None
    shapes = [(2 * intermediate, hidden), (hidden, intermediate)]
    return _Asked((), STACKED, shapes, layer.global_num_experts)


def _name(
    model: nn.Module, path: str, asked: _Asked, modules: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the names that a checkpoint may have for modules, the likeliest first."""
    place = path.removesuffix(_INNER)
    if asked.stack:
        return [(f"{n}.gate_up_proj", f"{n}.down_proj") for n in checkpoint_names(model, place)]
    parent = place.rpartition(".")[0]
    named = [checkpoint_names(model, f"{parent}.{m}" if parent else m) for m in modules]
    return list(zip(*named, strict=False))


def _trace(model: nn.Module, twin: nn.Module, path: str, asked: _Asked) -> tuple[HeldExperts, int]:
    """Return what a mixture holds, and which of the candidates of its names a checkpoint has.

    Raises:
        TraceError: it cannot be traced.
    """
    paths = f"{path}.{_WEIGHTS[0]}", f"{path}.{_WEIGHTS[1]}"
    for candidate, names in enumerate(_name(model, path, asked, asked.modules)):
        mixture = trace_mixture(twin, paths, names, asked.kinds, asked.shapes, asked.stack)
        if mixture is not None:
            return mixture, candidate
    raise TraceError("its model loads no module of its experts under the names of a checkpoint")


def _find_alike(
    model: nn.Module,
    twin: nn.Module,
    paths: Sequence[str],
    asked: _Asked,
    mixture: HeldExperts,
    candidate: int,
) -> list[str]:
    """Return the paths of the mixtures that load as the first one does."""
    size = len(asked.kinds)
    sample = list(dict.fromkeys([*asked.modules[:size], *asked.modules[-size:]]))
    stack = [asked.stack] if asked.stack else []
    suffix = "" if asked.stack else ".weight"
    loads: dict[str, Counter[Any]] = {}
    for start in range(0, len(paths), _AT_ONCE):
        part = paths[start : start + _AT_ONCE]
        names = {path: _name(model, path, asked, sample)[candidate] for path in part}
        shapes = {
            name: (*stack, *asked.shapes[number % size])
            for of_path in names.values()
            for number, name in enumerate(of_path)
        }
        calls = record_shapes(twin, shapes, suffix, mixture.style)
        # A class that holds weights back, until it has all, shows them under a later name.
        is_lazy = calls.keys() != shapes.keys()
        for path in part:
            asking = shapes if is_lazy else names[path]
            of_path = [call for name in asking for call in calls.get(name, ())]
            own = [call for call in of_path if call.path.startswith(f"{path}.")]
            loads[path] = Counter(sign(own) if is_lazy or len(own) == len(of_path) else ())
    return [path for path in paths if loads[path] and loads[path] == loads[paths[0]]]
