"""The LoRA of experts keeps every product, every bit and every zero in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expert_truth import (
    BY_EXPERT,
    MIXTURES,
    NEW,
    OLD,
    PROJ,
    Trained,
    W,
    assert_same,
    build_mixture,
    each_mixture,
    integers,
)

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Given, Half, Mixture
from vllm_nway_lora.adapters.target import LayoutError, Pair


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    form = draw(st.sampled_from(["apart", "w names", "stacked"]))
    changes: dict[str, Any] = {k: draw(st.integers(1, 7)) for k in ("hidden", "intermediate")}
    if draw(st.booleans()):  # one of both parameters is square
        changes["hidden"] = changes["intermediate"] * draw(st.integers(1, 2))
    changes |= W if form == "w names" else {}
    return build_mixture(
        experts=draw(st.integers(1, 5)),
        is_stacked=form == "stacked",
        is_interleaved=draw(st.booleans()),
        **changes,
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_layout_keeps_every_product(data: st.DataObject) -> None:
    draw = data.draw
    mixture = draw(mixtures())
    ranks = {kind: draw(st.integers(1, 3)) for kind in ("gate_up", "gate", "up", "down")}
    trained = Trained(mixture, scaling=draw(st.sampled_from([1.0, 0.5, 2.0])), **ranks)
    layout = draw(st.sampled_from(["nested", "stacked", "apart"]))
    config: dict[str, Any] = {}
    if layout == "nested":
        kinds = draw(st.sampled_from([("gate_up", "down"), ("gate_up",), ("down",)]))
        is_old, by_expert = draw(st.booleans()), draw(st.booleans())
        config = dict(OLD if is_old else NEW) | (BY_EXPERT if by_expert else {})
        pairs: dict[str, Given] = dict(trained.nested(*kinds, swapped=is_old, by_expert=by_expert))
    else:
        names = draw(st.sampled_from([PROJ, W]))
        kinds = tuple(draw(st.lists(st.sampled_from(sorted(names)), min_size=1, unique=True)))
        names = {kind: names[kind] for kind in kinds}
        if layout == "stacked" and draw(st.booleans()):
            names = {"gate_up": "gate_up_proj"} | (
                {"down": names["down"]} if "down" in names else {}
            )
            kinds = tuple(names)
        pairs = trained.stacked(names) if layout == "stacked" else trained.apart(names)
    assert_same(pairs, mixture, config, trained.deltas(*kinds))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_some_experts_and_other_ranks(data: st.DataObject) -> None:
    """Experts and projections without LoRA are zeros; lower ranks are filled with zeros."""
    mixture = data.draw(mixtures())
    experts = range(mixture.experts)
    pairs: dict[str, Given] = {}
    expected = Trained(mixture).deltas()
    for kind, name in PROJ.items():
        for e in data.draw(st.lists(st.sampled_from(experts), unique=True)):
            columns, rows = mixture.size(kind)
            r = data.draw(st.integers(1, 3))
            scaling = data.draw(st.sampled_from([1.0, 0.5, 2.0]))
            pair = Pair(integers(e, r, columns), integers(e + 1, rows, r), scaling)
            pairs[f"{e}.{name}"] = pair
            expected[kind][e] = pair.scaling * pair.b @ pair.a
    if pairs:
        assert_same(pairs, mixture, {}, expected)


@each_mixture
def test_matrices_that_experts_share(mixture: Mixture) -> None:
    """Megatron-Bridge's shared outer matrices: one module for A, another for B; or three dimensions."""
    trained = Trained(mixture)
    for kind in ("gate", "up"):
        a, b = trained.tensors[kind]
        trained.tensors[kind] = a[:1].expand_as(a).contiguous(), b
    a, b = trained.tensors["down"]
    trained.tensors["down"] = a, b[:1].expand_as(b).contiguous()
    expected = trained.deltas("gate", "up", "down")
    halves: dict[str, Given] = {}
    deep: dict[str, Given] = {}
    for kind, name in PROJ.items():
        a, b = trained.tensors[kind]
        is_down = kind == "down"
        halves[name] = Half(None if is_down else a[:1], b[:1] if is_down else None, 2.0)
        for e in range(mixture.experts):
            halves[f"{e}.{name}"] = Half(a[e] if is_down else None, None if is_down else b[e], 2.0)
        deep[W[kind]] = Pair(a if is_down else a[:1], b[:1] if is_down else b, 2.0)
    assert_same(halves, mixture, {}, expected)
    rule = assert_same(deep, mixture, {}, expected)
    assert rule.startswith("stacked experts: ")
    shared = build_mixture(is_shared=True)
    if not mixture.is_interleaved:
        assert_same(halves, shared, {}, expected)


def test_shared_mixture_takes_shared_matrices_only() -> None:
    shared = build_mixture(is_shared=True)
    trained = Trained(shared)
    with pytest.raises(
        LayoutError, match="have the same LoRA-A of gate_proj, and the adapter has diff"
    ):
        translate_experts(trained.apart(PROJ), shared, {})
    # gate_up's A is one for gate and up, but not for all experts.
    with pytest.raises(LayoutError, match="Start the server without it"):
        translate_experts(trained.nested("gate_up", "down"), shared, NEW)
    ungated = build_mixture(is_shared=True, is_gated=False)
    with pytest.raises(LayoutError, match="have no gate_proj"):
        translate_experts(trained.stacked({"up": "up_proj"}), ungated, {})
    names = {W[kind]: pair for kind, pair in ((k, trained.tensors[k]) for k in W)}
    given = {
        name: Pair(a if name == "w2" else a[:1], b[:1] if name == "w2" else b)
        for name, (a, b) in names.items()
    }
    written, rule = translate_experts(given, shared, {})
    assert rule == ""
    assert all(written[name].a is given[name].a for name in given)
    # vLLM needs the other matrix of each expert, also if they are equal.
    alike = given | {"w1": Pair(given["w1"].a, given["w1"].b[:1])}
    written, rule = translate_experts(alike, shared, {})
    assert rule == "stacked experts: stacked as w1, w2 and w3"
    assert torch.equal(written["w1"].b, alike["w1"].b.expand(4, -1, -1))
    written, rule = translate_experts({"w2": given["w2"]}, shared, {})
    assert rule == "stacked experts: stacked as w1, w2 and w3, zeros for gate_proj, up_proj"


def test_what_the_mixture_takes_is_returned_unchanged() -> None:
    for mixture, pairs, config in (
        (MIXTURES["apart"], Trained(MIXTURES["apart"]).apart(PROJ), {}),
        (MIXTURES["apart, w names"], Trained(MIXTURES["apart"]).apart(W), {}),
        (MIXTURES["stacked"], Trained(MIXTURES["stacked"]).nested("gate_up", "down"), NEW),
        (MIXTURES["stacked"], Trained(MIXTURES["stacked"]).nested("gate_up", "down", dims=3), {}),
        (MIXTURES["GPT-OSS"], Trained(MIXTURES["GPT-OSS"]).nested("gate_up", "down"), OLD),
    ):
        written, rule = translate_experts(pairs, mixture, config)
        assert rule == ""
        assert written.keys() == pairs.keys()
        for name, pair in written.items():
            assert pair.a is pairs[name].a
            assert pair.b is pairs[name].b
            assert pair.scaling == pairs[name].scaling


def test_equal_matrices_stay_one_and_the_rank_stays() -> None:
    """PEFT's file in three layouts and back is the file, bit for bit."""
    for is_interleaved in (False, True):
        stacked = build_mixture(is_stacked=True, is_interleaved=is_interleaved)
        apart = build_mixture(is_interleaved=is_interleaved)
        file = Trained(stacked, rank=3).nested("gate_up", "down")
        split, _ = translate_experts(file, apart, NEW)
        back, _ = translate_experts(split, stacked, NEW)
        for name, pair in back.items():
            assert torch.equal(pair.a, file[name].a)
            assert torch.equal(pair.b, file[name].b)
            assert pair.scaling == file[name].scaling


def test_bits_stay() -> None:
    stacked, apart = MIXTURES["stacked"], MIXTURES["apart"]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        trained = Trained(apart)
        trained.tensors = {
            kind: (torch.randn_like(a).to(dtype), torch.randn_like(b).to(dtype))
            for kind, (a, b) in trained.tensors.items()
        }
        file = trained.nested("gate_up", "down", swapped=True)
        for mixture in (stacked, apart):
            written, _ = translate_experts(file, mixture, OLD)
            assert {t.dtype for p in written.values() for t in (p.a, p.b)} == {dtype}
            assert {p.scaling for p in written.values()} == {2.0}
        a, b = trained.tensors["gate_up"]
        assert torch.equal(written["3.gate_proj"].a, a[3])
        assert torch.equal(written["3.up_proj"].b, b[3, 5:])
