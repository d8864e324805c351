# SPDX-License-Identifier: Apache-2.0
"""Translate the LoRA of a mixture's experts into the layout that its layer takes. Pure torch, no vLLM.

Every translation is exact: it moves, shares or repeats values and adds zeros. Scalings stay apart, unless
modules with different ones become one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_nway_lora.adapters.expert_readers import parse_module, read_kind
from vllm_nway_lora.adapters.expert_types import Given, Mixture, Projection
from vllm_nway_lora.adapters.nested_experts import INNER, OUTER, read_nested
from vllm_nway_lora.adapters.target import LayoutError, Pair

#: Projection -> module of ``--enable-moe-shared-loras``.
_SHARED = {"gate": "w1", "down": "w2", "up": "w3"}


def translate_experts(
    pairs: Mapping[str, Given], mixture: Mixture, config: Mapping[str, Any]
) -> tuple[dict[str, Pair], str]:
    """Return a mixture's modules in the layout that it takes, and a phrase on what was done.

    The phrase is empty, and the pairs are those given, if they have that layout.

    Args:
        pairs: module below the mixture's path -> its tensors; ``""`` is the mixture itself. A
            :class:`Half` can lack one of them.
        mixture: what the mixture takes.
        config: adapter_config.json (see :func:`read_nested`).

    Raises:
        LayoutError: a tensor is missing, is there twice, does not fit, or has two meanings; or the
            mixture cannot take what the tensors say.
    """
    found, steps, sources = _read(pairs, mixture, config)
    absent = [kind for kind in mixture.kinds if kind not in found]
    if mixture.is_stacked:
        if mixture.is_gated and set(pairs) == {OUTER, INNER} and not steps:
            return _unchanged(pairs), ""
        written = _nest(found, mixture, steps)
        steps.append("stacked as gate_up_proj and down_proj")
    elif mixture.is_shared:
        written = _share(_complete(found, mixture), mixture)
        if set(pairs) == set(written) and all(
            (pair.a if name == _SHARED["down"] else pair.b).shape[0] == mixture.experts
            for name, pair in _unchanged(pairs).items()
        ):
            return _unchanged(pairs), ""
        steps.append("stacked as w1, w2 and w3")
    else:
        written = _set_apart(_complete(found, mixture), mixture, steps)
        own = {name for names in mixture.modules for name in names.values()}
        kept = [name for name in written if name in pairs]
        is_kept = all(_is_same(pairs[name], written[name]) for name in kept)
        if is_kept and len(kept) == len(written) and set(pairs) <= own:
            return _unchanged(pairs), ""
        if sources != ["experts apart"]:
            steps.append(f"split into the modules of {mixture.experts} experts")
        elif set(pairs) - own:
            steps.append("renamed as the layer takes them")
        elif not is_kept and not steps:
            steps.append("ranks and scalings made equal")
    if absent:
        steps.append(f"zeros for {', '.join(f'{kind}_proj' for kind in absent)}")
    fewer: dict[int, list[str]] = {}
    for kind, projection in found.items():
        fewer.setdefault(len(projection.absent & set(mixture.local)), []).append(f"{kind}_proj")
    steps += [f"zeros for {', '.join(of)} of {n} experts" for n, of in fewer.items() if n]
    return written, f"{' and '.join(sources)}: {', '.join(steps)}"


def _read(
    pairs: Mapping[str, Given], mixture: Mixture, config: Mapping[str, Any]
) -> tuple[dict[str, Projection], list[str], list[str]]:
    """Return the projections that an adapter has, and phrases on what was done and on the layout."""
    nested = {suffix: given for suffix, given in pairs.items() if suffix in (OUTER, INNER)}
    modules: dict[str, dict[int | None, tuple[str, Given]]] = {}
    for suffix, given in pairs.items():
        if suffix in nested:
            continue
        kind, expert = parse_module(suffix, mixture)
        first, _ = modules.setdefault(kind, {}).setdefault(expert, (suffix, given))
        if first != suffix:
            raise LayoutError(
                f"{mixture.name(first)} and {mixture.name(suffix)} are the same projection"
            )
    found: dict[str, Projection] = {}
    steps: list[str] = []
    if nested:
        found, steps = read_nested(nested, mixture, config)
    for kind, of in modules.items():
        if kind in found:
            name = next(iter(of.values()))[0]
            raise LayoutError(
                f"{mixture.place(name)}: {mixture.name(OUTER)} has {kind}_proj of all experts too"
            )
        found[kind] = read_kind(kind, of, mixture, config)
    sources = {
        "nested experts": bool(nested),
        "stacked experts": any(None in of for of in modules.values()),
        "experts apart": any(e is not None for of in modules.values() for e in of),
    }
    return _split(found, mixture), steps, [name for name, is_there in sources.items() if is_there]


def _unchanged(pairs: Mapping[str, Given]) -> dict[str, Pair]:
    return {
        name: Pair(given.a, given.b, given.scaling)
        for name, given in pairs.items()
        if given.a is not None and given.b is not None
    }


def _is_same(given: Given, pair: Pair) -> bool:
    return given.a is pair.a and given.b is pair.b and given.scaling == pair.scaling


def _split(found: Mapping[str, Projection], mixture: Mixture) -> dict[str, Projection]:
    """Return gate and up in place of gate_up; they have the same A."""
    found = dict(found)
    fused = found.pop("gate_up", None)
    if fused is None:
        return found
    if both := sorted(found.keys() & {"gate", "up"}):
        raise LayoutError(
            f"{mixture.place(OUTER)}: it has gate_up_proj, and {both[0]}_proj of its own too"
        )
    n = mixture.intermediate
    rows = {"gate": slice(0, n), "up": slice(n, None)}
    if mixture.is_interleaved:
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    for kind, of in rows.items():
        found[kind] = Projection(fused.a, [b[of] for b in fused.b], fused.scaling, fused.absent)
    return found


def _complete(found: Mapping[str, Projection], mixture: Mixture) -> dict[str, Projection]:
    """Return all projections; the absent ones are zeros."""
    like = next(iter(found.values()))
    return {kind: found.get(kind) or _zeros(kind, like, mixture) for kind in mixture.kinds}


def _zeros(kind: str, like: Projection, mixture: Mixture) -> Projection:
    """Return a projection of zeros with the rank, the types and the scaling of another one."""
    columns, rows = mixture.size(kind)
    a, b = like.a[0].new_zeros(like.rank, columns), like.b[0].new_zeros(rows, like.rank)
    n = mixture.experts
    return Projection([a] * n, [b] * n, like.scaling, frozenset(range(n)))


def _set_apart(
    found: Mapping[str, Projection], mixture: Mixture, steps: list[str]
) -> dict[str, Pair]:
    """Return a module per local expert and projection."""
    if mixture.scales_alike and len({projection.scaling for projection in found.values()}) > 1:
        found = {kind: projection.fold() for kind, projection in found.items()}
        steps.append("scalings multiplied into LoRA-B")
    return {
        name: Pair(found[kind].a[e], found[kind].b[e], found[kind].scaling)
        for e in mixture.local
        for kind, name in mixture.modules[e].items()
    }


def _nest(found: Mapping[str, Projection], mixture: Mixture, steps: list[str]) -> dict[str, Pair]:
    """Return gate_up_proj and down_proj as PEFT nests them.

    A is ``(experts * r, columns)`` and B is ``(rows, r * experts)``, the expert fastest
    (``_stack_moe_lora_weights`` and ``_convert_3d_to_2d_moe_lora``, vllm/lora/model_manager.py).
    """
    if not mixture.is_gated:
        raise LayoutError(
            f"{mixture.place(OUTER)}: vLLM takes stacked experts for gate_up_proj and down_proj, and "
            "the model's experts have no gate_proj. Do not set is_3d_lora_weight in the request"
        )
    written = {}
    gate, up = found.get("gate"), found.get("up")
    like = gate or up or found["down"]
    down = found.get("down") or _zeros("down", like, mixture)
    gate_up = _join(gate, up, mixture, steps) if gate or up else _zeros("gate_up", like, mixture)
    for suffix, projection in ((INNER, gate_up), (OUTER, down)):
        b = torch.stack(list(projection.b), dim=-1)  # (rows, r, experts)
        written[suffix] = Pair(torch.cat(list(projection.a)), b.flatten(1), projection.scaling)
    return written


def _join(
    gate: Projection | None, up: Projection | None, mixture: Mixture, steps: list[str]
) -> Projection:
    """Return gate_up of gate and up: B block-diagonal, as ``PeftConcatenate`` does it (PEFT 0.19,
    peft/utils/transformers_weight_conversion.py), unless both have the same A.
    """
    if gate and up and gate.scaling != up.scaling:
        gate, up = gate.fold(), up.fold()
        steps.append("scalings multiplied into LoRA-B")
    like = gate or up
    assert like is not None
    first, second = gate or like, up or like
    is_one = all(x is y or torch.equal(x, y) for x, y in zip(first.a, second.a, strict=True))
    no_rows = torch.zeros_like(like.b[0])
    rank, all_a, all_b = first.rank, [], []
    for e in range(mixture.experts):
        g = first.b[e] if gate else no_rows
        u = second.b[e] if up else no_rows
        if is_one:
            all_a.append(first.a[e])
        else:
            all_a.append(torch.cat([first.a[e], second.a[e]]))
            g, u = (
                torch.nn.functional.pad(g, (0, second.rank)),
                torch.nn.functional.pad(u, (rank, 0)),
            )
        if mixture.is_interleaved:
            all_b.append(torch.stack([g, u], dim=1).flatten(0, 1))
        else:
            all_b.append(torch.cat([g, u]))
    if not is_one:
        steps.append(f"gate_proj and up_proj block-diagonal, rank {rank + second.rank}")
    return Projection(all_a, all_b, like.scaling)


def _share(found: Mapping[str, Projection], mixture: Mixture) -> dict[str, Pair]:
    """Return w1, w2 and w3: the matrices at the hidden side once, the other ones ``(experts, ...)``.

    ``PackedLoRALayerWeights.pack_moe_stacked``, vllm/lora/lora_weights.py.
    """
    if not mixture.is_gated:
        raise LayoutError(
            f"{mixture.place(OUTER)}: --enable-moe-shared-loras needs w1, w2 and w3, and the model's "
            "experts have no gate_proj"
        )
    written = {}
    for kind, name in _SHARED.items():
        projection = found[kind]
        outer, own = projection.a, projection.b
        if kind == "down":
            outer, own = own, outer
        if len(projection.absent) < mixture.experts:
            outer = [t for e, t in enumerate(outer) if e not in projection.absent]
        if not all(t is outer[0] or torch.equal(t, outer[0]) for t in outer):
            raise LayoutError(
                f"{mixture.place(OUTER)}: with --enable-moe-shared-loras all experts have the same "
                f"{'LoRA-B of down_proj' if kind == 'down' else f'LoRA-A of {kind}_proj'}, and the "
                "adapter has different ones. Start the server without it"
            )
        once, each = outer[0][None], torch.stack(list(own))
        a, b = (each, once) if kind == "down" else (once, each)
        written[name] = Pair(a, b, projection.scaling)
    return written
