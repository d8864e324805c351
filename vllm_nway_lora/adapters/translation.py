# SPDX-License-Identifier: Apache-2.0
"""Translate an adapter of another layout into the modules that the model's LoRA layers take.

Every translation keeps each product ``scaling * B A``, and the result is admitted like any adapter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vllm.lora.lora_weights import LoRALayerWeights

from vllm_nway_lora.adapters.config import get_kind
from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Given, Half
from vllm_nway_lora.adapters.fit import find_fault_of_pair
from vllm_nway_lora.adapters.layouts import fold_parts, split_fused
from vllm_nway_lora.adapters.mixtures import read_mixture
from vllm_nway_lora.adapters.names import Names
from vllm_nway_lora.adapters.origin import Origin, get_origin, set_origin
from vllm_nway_lora.adapters.served import read_target
from vllm_nway_lora.adapters.target import LayoutError, Pair, Target
from vllm_nway_lora.adapters.tensors import carry_copy


def translate_adapter(manager: Any, adapter: Any, unused: Collection[str]) -> bool:
    """Translate the modules of ``adapter`` that no layer takes as they are.

    Sets ``adapter.loras`` and adds the rules to the adapter's origin, if a rule applies.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
        unused: the modules that no layer takes.

    Returns:
        Whether a rule applied.

    Raises:
        LayoutError: a module has no exact translation. The adapter is unchanged.
    """
    target, origin = read_target(manager), get_origin(adapter)
    paths = _resolve(adapter, origin, unused, target)
    kept = {module: weights for module, weights in adapter.loras.items() if module not in paths}
    rules = list(_describe_renames(paths))
    dense: dict[str, Pair] = {}
    by_mixture: dict[str, dict[str, Given]] = {}
    for module, path in paths.items():
        weights = adapter.loras[module]
        mixture = _mixture_of(path, target)
        if mixture is not None:
            name = path.removeprefix(mixture).removeprefix(".")
            by_mixture.setdefault(mixture, {})[name] = _read(weights)
        else:
            # Once folded or split, it no longer shows what adapter_config.json says.
            is_changed = path in target.fused or path in target.parts
            if fault := find_fault_of_pair(weights) if is_changed else "":
                raise LayoutError(f"module {module}: {fault}")
            dense[path] = Pair(weights.lora_a, weights.lora_b, weights.scaling)
    new, more = _translate_dense(dense, kept, target, origin)
    rules += more
    ranks: dict[str, int] = {}
    for mixture, given in by_mixture.items():
        taken = read_mixture(manager, adapter, mixture, manager.modules[mixture])
        taken = dataclasses.replace(taken, source=_find_source(mixture, paths, origin))
        pairs, rule = translate_experts(given, taken, origin.config)
        rules += [rule] if rule else []
        for name, pair in pairs.items():
            path = f"{mixture}.{name}" if name else mixture
            new[path] = pair
            if taken.is_stacked and pair.a.ndim == 2:  # its rows are the ranks of all experts
                ranks[path] = pair.a.shape[0] // taken.experts
    if not rules:
        return False
    sources = {path: adapter.loras[module] for module, path in paths.items()}
    is_pinned = any(map(_is_pinned, sources.values()))
    adapter.loras = kept | {
        path: _keep(sources.get(path), pair)
        or _write(path, pair, ranks.get(path, pair.a.shape[-2]), is_pinned, sources.get(path))
        for path, pair in new.items()
    }
    rules = list(dict.fromkeys(rules))
    set_origin(adapter, dataclasses.replace(origin, rules=(*origin.rules, *rules)))
    return True


def _translate_dense(
    pairs: Mapping[str, Pair], kept: Mapping[str, Any], target: Target, origin: Origin
) -> tuple[dict[str, Pair], list[str]]:
    """Translate the modules outside of mixtures; return the new pairs, and the rules applied."""
    # Of modules that layers take as they are: one of them can have a fused layer's rows too.
    own = {
        path: Pair(weights.lora_a, weights.lora_b, weights.scaling)
        for path, weights in kept.items()
        if path in target.modules and _is_whole(weights)
    }
    found, rules = split_fused(own | dict(pairs), target)
    found, more = fold_parts(found, target)
    rules += more
    new = {path: pair for path, pair in found.items() if path not in own}
    if _is_vera(origin):
        new = {path: _trim(pair, target.columns.get(path)) for path, pair in new.items()}
        rules.append("VeRA's shared LoRA-A cut to each module's columns")
    return new, rules


def _resolve(
    adapter: Any, origin: Origin, unused: Collection[str], target: Target
) -> dict[str, str]:
    """Return module -> path of those that may need a translation; layers take the others as they are."""
    names = Names(target)
    paths: dict[str, str] = {}
    sources: dict[str, str] = {}
    for module, weights in adapter.loras.items():
        path = module
        if module in unused or _is_vera(origin):
            path = names.resolve(module, origin.names.get(module, module)) or module
        is_expert = _mixture_of(path, target) is not None
        if not (is_expert or module in unused or _is_vera(origin)):
            continue
        if not (is_expert or _is_whole(weights)):
            continue  # admission names the missing half
        other = sources.setdefault(path, module)
        if other != module or (path != module and path in adapter.loras):
            raise LayoutError(
                f"modules {module} and {other if other != module else path} are both {path}"
            )
        paths[module] = path
    return paths


def _find_source(mixture: str, paths: Mapping[str, str], origin: Origin) -> str:
    """Return the name of a mixture in the adapter's file."""
    module = next(module for module, path in paths.items() if f"{path}.".startswith(f"{mixture}."))
    suffix = paths[module].removeprefix(mixture)
    return origin.names.get(module, module).removesuffix(suffix)


def _describe_renames(paths: Mapping[str, str]) -> Iterator[str]:
    """Yield a phrase per kind of rename: the parts of the names that differ, without layers' numbers."""
    counts: dict[str, int] = {}
    for module, path in paths.items():
        if module != path:
            old, new = module.split("."), path.split(".")
            while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
                del old[-1], new[-1]
            phrase = re.sub(r"\b\d+\b", "*", f"{'.'.join(old)} read as {'.'.join(new)}")
            counts[phrase] = counts.get(phrase, 0) + 1
    for phrase, count in counts.items():
        yield f"{phrase} in {count} modules"


def _mixture_of(path: str, target: Target) -> str | None:
    if not target.mixtures:
        return None
    parts = path.split(".")
    prefixes = (".".join(parts[:stop]) for stop in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in target.mixtures), None)


def _is_vera(origin: Origin) -> bool:
    return get_kind(origin.config) == "VERA"


def _trim(pair: Pair, columns: int | None) -> Pair:
    """Cut VeRA's shared LoRA-A, which has the columns of the widest module, to a module's own."""
    return dataclasses.replace(pair, a=pair.a[:, :columns])


def _read(weights: Any) -> Given:
    kind = Pair if _is_whole(weights) else Half
    return kind(weights.lora_a, weights.lora_b, weights.scaling)


def _is_whole(weights: Any) -> bool:
    return weights.lora_a is not None and weights.lora_b is not None


def _is_pinned(weights: Any) -> bool:
    return any(half is not None and half.is_pinned() for half in (weights.lora_a, weights.lora_b))


def _keep(weights: Any, pair: Pair) -> Any:
    """Return a module's own weights, with all their notes; None if its tensors have changed."""
    if weights is None or weights.lora_a is not pair.a or weights.lora_b is not pair.b:
        return None
    return weights


def _write(path: str, pair: Pair, rank: int, is_pinned: bool, source: Any) -> LoRALayerWeights:
    a, b = pair.a.contiguous(), pair.b.contiguous()
    if is_pinned:
        a, b = a.pin_memory(), b.pin_memory()
    weights = LoRALayerWeights(path, rank, pair.scaling * rank, a, b, pair.scaling)
    carry_copy(source, weights)
    return weights
