"""One trained function of experts in every layout, and what vLLM applies of a translation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Given, Mixture, Swaps
from vllm_nway_lora.adapters.target import Pair

PATH = "model.layers.0.mlp.experts"
NEW, OLD = {"peft_version": "0.19.1"}, {"peft_version": "0.18.1"}
BY_EXPERT = {"vllm_nway_lora": {"expert_lora_b": "expert-major"}}
UNTOLD = Swaps(old=None, new=None)

Deltas = dict[str, torch.Tensor]


def build_mixture(**changes: Any) -> Mixture:
    """Return a mixture of 4 experts apart; ``gate``, ``down`` and ``up`` name the modules."""
    sizes = {"experts": 4, "hidden": 12, "intermediate": 5} | changes
    names = {k: sizes.pop(k, f"{k}_proj") for k in ("gate", "down", "up")}
    if not sizes.get("is_gated", True):
        names = {k: names[k] for k in ("up", "down")}
    is_apart = not (sizes.get("is_stacked") or sizes.get("is_shared"))
    experts = range(sizes["experts"])
    modules = [{k: f"{e}.{name}" for k, name in names.items()} for e in experts]
    sizes = {"modules": modules if is_apart else (), "local": experts} | sizes
    return Mixture(path=PATH, layer="Layer", **sizes)


def integers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).float()


class Trained:
    """The LoRA of all experts: per projection A ``(experts, r, columns)`` and B ``(experts, rows, r)``."""

    def __init__(self, mixture: Mixture, rank: int = 2, scaling: float = 2.0, **ranks: int) -> None:
        self.mixture, self.scaling = mixture, scaling
        self.tensors = {}
        for number, kind in enumerate(("gate_up", "up", "down", "gate")):
            columns, rows = mixture.size(kind)
            r = ranks.get(kind, rank)
            a = integers(number, mixture.experts, r, columns)
            self.tensors[kind] = a, integers(number + 9, mixture.experts, rows, r)

    def deltas(self, *kinds: str) -> Deltas:
        """Return ``(experts, rows, columns)`` of gate, up and down if only ``kinds`` were trained."""
        n, mixture = self.mixture.intermediate, self.mixture
        found = {}
        for kind in ("gate", "up", "down"):
            columns, rows = mixture.size(kind)
            found[kind] = torch.zeros(mixture.experts, rows, columns)
        for kind in kinds:
            a, b = self.tensors[kind]
            delta = self.scaling * b @ a
            if kind == "gate_up":
                is_alternating = mixture.is_interleaved
                found["gate"] = delta[:, ::2] if is_alternating else delta[:, :n]
                found["up"] = delta[:, 1::2] if is_alternating else delta[:, n:]
            else:
                found[kind] = delta
        return found if mixture.is_gated else {k: found[k] for k in ("up", "down")}

    def nested(
        self, *kinds: str, swapped: bool = False, by_expert: bool = False, dims: int = 2
    ) -> dict[str, Pair]:
        """Return PEFT's ``target_parameters``: the first one is nested in the last one."""
        pairs = {}
        for kind in kinds:
            a, b = self.tensors[kind]
            if swapped:
                a, b = b.mT, a.mT
            n, r, columns = a.shape
            b = b.permute(1, 0, 2) if by_expert else b.permute(1, 2, 0)
            if dims == 2:
                a, b = a.reshape(n * r, columns), b.reshape(-1, n * r)
            suffix = "base_layer" if kind != kinds[-1] else ""
            pairs[suffix] = Pair(a.contiguous(), b.contiguous(), self.scaling)
        return pairs

    def stacked(self, names: Mapping[str, str]) -> dict[str, Given]:
        """Return a module of three dimensions per projection: projection -> name."""
        return {name: Pair(*self.tensors[kind], self.scaling) for kind, name in names.items()}

    def apart(
        self, names: Mapping[str, str], experts: range | list[int] | None = None
    ) -> dict[str, Given]:
        """Return a module per expert and projection."""
        experts = range(self.mixture.experts) if experts is None else experts
        return {
            f"{e}.{name}": Pair(self.tensors[kind][0][e], self.tensors[kind][1][e], self.scaling)
            for e in experts
            for kind, name in names.items()
        }


PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W = {"gate": "w1", "up": "w3", "down": "w2"}


def read_deltas(pairs: Mapping[str, Given], mixture: Mixture) -> Deltas:
    """Return what vLLM applies, from the layout that a mixture takes, to the local experts."""
    n, local = mixture.experts, list(mixture.local)
    size = mixture.intermediate

    def product(pair: Given, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pair.scaling * b @ a

    if mixture.is_stacked:
        assert set(pairs) == {"", "base_layer"}
        found = {}
        for name, pair in pairs.items():
            a = pair.a.reshape(n, -1, pair.a.shape[-1])
            b = pair.b.reshape(pair.b.shape[0], -1, n).permute(2, 0, 1)
            found[name] = product(pair, a, b)
        gate_up = found["base_layer"]
        rows = (
            (slice(0, None, 2), slice(1, None, 2))
            if mixture.is_interleaved
            else (slice(0, size), slice(size, None))
        )
        return {"gate": gate_up[:, rows[0]], "up": gate_up[:, rows[1]], "down": found[""]}
    if mixture.is_shared:
        assert {name: (p.a.shape[0], p.b.shape[0]) for name, p in pairs.items()} == {
            "w1": (1, n),
            "w3": (1, n),
            "w2": (n, 1),
        }
        return {
            kind: product(pairs[name], pairs[name].a, pairs[name].b) for kind, name in W.items()
        }
    wanted = {name for e in local for name in mixture.modules[e].values()}
    assert set(pairs) == wanted
    return {
        kind: torch.stack(
            [
                product(pair, pair.a, pair.b)
                for pair in (pairs[mixture.modules[e][kind]] for e in local)
            ]
        )
        for kind in mixture.modules[0]
    }


def assert_same(
    pairs: Mapping[str, Given], mixture: Mixture, config: Mapping[str, Any], expected: Deltas
) -> str:
    """Check the products of a translation, and that vLLM can scale each B in place; return its rule."""
    copies = {name: copy.deepcopy(pair) for name, pair in pairs.items()}
    written, rule = translate_experts(copies, mixture, config)
    found = read_deltas(written, mixture)
    assert found.keys() == expected.keys()
    for kind, delta in found.items():
        assert torch.equal(delta, expected[kind][list(mixture.local)]), kind
    if not mixture.is_stacked and not mixture.is_shared:
        for kind in mixture.modules[0]:
            of = [written[mixture.modules[e][kind]] for e in mixture.local]
            assert len({(p.a.shape, p.b.shape, p.scaling) for p in of}) == 1
    for pair in written.values():
        pair.b.mul_(3.0)
    for kind, delta in read_deltas(written, mixture).items():
        assert torch.equal(delta, 3 * found[kind]), kind
    return rule


#: One of both parameters has as many columns as rows.
SQUARE_GATE_UP, SQUARE_DOWN = {"hidden": 10}, {"hidden": 5}


def given_types() -> Iterator[tuple[str, Mixture]]:
    yield "apart", build_mixture()
    yield "apart, w names", build_mixture(**W)
    yield "stacked", build_mixture(is_stacked=True)
    yield "GPT-OSS", build_mixture(is_stacked=True, is_interleaved=True)
    yield "GPT-OSS apart", build_mixture(is_interleaved=True)


MIXTURES = dict(given_types())
each_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
