"""What a translation of experts says of itself, and the orientation and scalings that it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.expert_truth import (
    BY_EXPERT,
    MIXTURES,
    NEW,
    OLD,
    PROJ,
    SQUARE_DOWN,
    SQUARE_GATE_UP,
    UNTOLD,
    Deltas,
    Trained,
    W,
    assert_same,
    build_mixture,
)

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Mixture, Swaps
from vllm_nway_lora.adapters.target import Pair

RULES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "PEFT 0.19 on experts apart": (
        "apart",
        lambda t: t.nested("gate_up", "down"),
        NEW,
        "nested experts: split into the modules of 4 experts",
    ),
    "PEFT 0.18 on experts apart": (
        "apart",
        lambda t: t.nested("gate_up", "down", swapped=True),
        OLD,
        "nested experts: columns and rows swapped back, split into the modules of 4 experts",
    ),
    "PEFT 0.18 on stacked experts": (
        "stacked",
        lambda t: t.nested("gate_up", "down", swapped=True),
        OLD,
        "nested experts: columns and rows swapped back, stacked as gate_up_proj and down_proj",
    ),
    "one parameter": (
        "stacked",
        lambda t: t.nested("gate_up"),
        NEW,
        "nested experts: stacked as gate_up_proj and down_proj, zeros for down_proj",
    ),
    "expert-major": (
        "stacked",
        lambda t: t.nested("gate_up", "down", by_expert=True),
        NEW | BY_EXPERT,
        "nested experts: LoRA-B's columns ordered by rank, stacked as gate_up_proj and down_proj",
    ),
    "B by expert": (
        "stacked",
        lambda t: {
            n: Pair(p.a, p.b.permute(2, 0, 1), p.scaling)
            for n, p in t.nested("gate_up", "down", dims=3).items()
        },
        NEW,
        "nested experts: LoRA-B's experts moved to its last dimension, stacked as gate_up_proj and "
        "down_proj",
    ),
    "exchanged": (
        "apart",
        lambda t: t.nested("down", "gate_up"),
        NEW,
        "nested experts: gate_up_proj and down_proj exchanged, split into the modules of 4 experts",
    ),
    "other names": (
        "apart",
        lambda t: t.apart(W),
        {},
        "experts apart: renamed as the layer takes them",
    ),
    "some experts": (
        "apart",
        lambda t: t.apart({"down": "down_proj"}, [1, 3]),
        {},
        "experts apart: zeros for gate_proj, up_proj, zeros for down_proj of 2 experts",
    ),
    "apart on stacked": (
        "stacked",
        lambda t: t.apart(PROJ),
        {},
        "experts apart: gate_proj and up_proj block-diagonal, rank 4, stacked as gate_up_proj and "
        "down_proj",
    ),
    "Megatron-Bridge in memory": (
        "apart",
        lambda t: t.stacked({"gate_up": "gate_up_proj", "down": "down_proj"}),
        {},
        "stacked experts: split into the modules of 4 experts",
    ),
    "two kinds": (
        "apart",
        lambda t: t.stacked({"down": "w2"}) | t.apart({"gate": "w1", "up": "w3"}),
        {},
        "stacked experts and experts apart: split into the modules of 4 experts",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case: str) -> None:
    name, build, config, rule = RULES[case]
    trained = Trained(MIXTURES[name])
    kinds = {"one parameter": ("gate_up",), "some experts": ("down",)}.get(
        case, ("gate_up", "down") if rule.startswith("nested") or "memory" in case else tuple(PROJ)
    )
    expected = trained.deltas(*kinds)
    if case == "some experts":
        expected["down"][[0, 2]] = 0
    assert assert_same(build(trained), MIXTURES[name], config, expected) == rule


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize(("sizes", "kind"), [(SQUARE_GATE_UP, "gate_up"), (SQUARE_DOWN, "down")])
@pytest.mark.parametrize("is_old", [False, True])
def test_release_of_peft_tells_the_orientation_of_a_square_parameter(
    is_stacked: bool, sizes: dict[str, int], kind: str, is_old: bool
) -> None:
    config = OLD if is_old else NEW
    for swaps in (Swaps(True, False), Swaps(False, True), Swaps(False, False)):
        mixture = build_mixture(is_stacked=is_stacked, swaps=swaps, **sizes)
        trained = Trained(mixture)
        is_swapped = bool(swaps[not is_old])
        assert_same(trained.nested(kind, swapped=is_swapped), mixture, config, trained.deltas(kind))
    # The other parameter tells, whatever the release says.
    for is_swapped in (False, True):
        mixture = build_mixture(is_stacked=is_stacked, swaps=UNTOLD, **sizes)
        pairs = Trained(mixture).nested("gate_up", "down", swapped=is_swapped)
        assert_same(pairs, mixture, {}, Trained(mixture).deltas("gate_up", "down"))


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1", "0.17.1", "0.19.0", "0.21.2", "1.0"])
def test_releases(version: str) -> None:
    mixture = build_mixture(hidden=5)
    is_old = version.startswith(("0.17", "0.18"))
    pairs = Trained(mixture).nested("down", swapped=is_old)
    config = {"peft_version": version}
    assert_same(pairs, mixture, config, Trained(mixture).deltas("down"))


@pytest.mark.parametrize("names", [["up_proj"], ["down_proj"], ["up_proj", "down_proj"]])
def test_experts_without_a_gate(names: list[str]) -> None:
    """Nemotron-H: up_proj and down_proj have the same sizes, so that only names tell."""
    mixture = build_mixture(is_gated=False)
    trained = Trained(mixture)
    kinds = [name.removesuffix("_proj") for name in names]
    config = NEW | {"target_parameters": [f"experts.{name}" for name in names]}
    for is_swapped in (False, True):
        pairs = trained.nested(*kinds, swapped=is_swapped)
        assert_same(pairs, mixture, config, trained.deltas(*kinds))
    assert_same(trained.apart({k: PROJ[k] for k in kinds}), mixture, {}, trained.deltas(*kinds))
    assert_same(trained.stacked({k: PROJ[k] for k in kinds}), mixture, {}, trained.deltas(*kinds))


def test_only_the_experts_of_a_rank_are_written() -> None:
    mixture = build_mixture(local=range(2, 4))
    trained = Trained(mixture)
    assert_same(trained.nested("gate_up", "down"), mixture, NEW, trained.deltas("gate_up", "down"))
    whole = trained.apart(PROJ)
    written, rule = translate_experts(whole, mixture, {})
    assert rule == ""
    assert written.keys() == whole.keys()
    # vLLM reads a rank's experts only.
    here = trained.apart(PROJ, [2, 3])
    assert translate_experts(here, mixture, {})[1] == ""
    rule = assert_same(trained.apart(PROJ, [3]), mixture, {}, _only(trained, [3]))
    assert rule == "experts apart: zeros for gate_proj, up_proj, down_proj of 1 experts"


def _only(trained: Trained, experts: list[int]) -> Deltas:
    expected = trained.deltas(*PROJ)
    others = [e for e in range(trained.mixture.experts) if e not in experts]
    for delta in expected.values():
        delta[others] = 0
    return expected


class TestScalings:
    def test_patterns_name_parameters(self) -> None:
        """vLLM takes the mixture's own module for down_proj, also if it is gate_up_proj alone."""
        config = NEW | {
            **{"r": 2, "lora_alpha": 4},
            "rank_pattern": {r".*\.gate_up_proj": 4},
            "alpha_pattern": {r".*\.gate_up_proj": 32, "experts.down_proj": 2},
        }
        for mixture in (MIXTURES["apart"], MIXTURES["stacked"]):
            trained = Trained(mixture, gate_up=4, down=2)
            both = trained.deltas("gate_up", "down")
            expected = {k: delta * (0.5 if k == "down" else 4) for k, delta in both.items()}
            rule = assert_same(trained.nested("gate_up", "down"), mixture, config, expected)
            assert "gate_up_proj scaled as adapter_config.json says" in rule
            alone = trained.nested("gate_up")
            expected["down"] = torch.zeros_like(expected["down"])
            assert_same(alone, mixture, config, expected)
        config |= {"use_rslora": True}
        expected = {k: delta * (0.0 if k == "down" else 8) for k, delta in both.items()}
        assert_same(trained.nested("gate_up"), MIXTURES["stacked"], config, expected)

    def test_pattern_with_another_path_leaves_the_scaling(self) -> None:
        config = NEW | {"r": 2, "lora_alpha": 4, "alpha_pattern": {"language.gate_up_proj": 32}}
        trained = Trained(MIXTURES["stacked"])
        assert (
            translate_experts(trained.nested("gate_up", "down"), MIXTURES["stacked"], config)[1]
            == ""
        )

    def test_joined_modules_with_two_scalings(self) -> None:
        mixture = MIXTURES["stacked"]
        trained = Trained(mixture)
        pairs = trained.apart(PROJ)
        pairs |= {n: Pair(p.a, p.b, 0.5) for n, p in pairs.items() if "up_proj" in n}
        expected = trained.deltas(*PROJ)
        expected["up"] = expected["up"] / 4
        rule = assert_same(pairs, mixture, {}, expected)
        assert "scalings multiplied into LoRA-B" in rule
        written, _ = translate_experts(trained.apart(PROJ), mixture, {})
        assert {pair.scaling for pair in written.values()} == {2.0}

    def test_release_with_one_scaling_for_all(self) -> None:
        trained = Trained(MIXTURES["apart"])
        pairs = trained.apart(PROJ)
        pairs |= {n: Pair(p.a, p.b.bfloat16(), 0.3) for n, p in pairs.items() if "down" in n}
        assert translate_experts(pairs, MIXTURES["apart"], {})[1] == ""
        mixture = build_mixture(scales_alike=True)
        written, rule = translate_experts(pairs, mixture, {})
        assert rule == "experts apart: scalings multiplied into LoRA-B"
        assert {pair.scaling for pair in written.values()} == {1.0}
        down = pairs["1.down_proj"]
        assert torch.equal(written["1.down_proj"].b, down.b.float() * 0.3)
        assert torch.equal(written["1.up_proj"].b, 2 * pairs["1.up_proj"].b)


def test_patterns_are_for_the_names_in_the_file() -> None:
    """A text model's file has other names than the multimodal class that serves it."""
    config = {
        **{"r": 2, "lora_alpha": 4, "peft_version": "0.21.2"},
        "alpha_pattern": {r"^layers\.0\.mlp\.experts.*": 16},
    }
    mixture = Mixture(
        path="language_model.model.layers.0.mlp.experts",
        source="layers.0.mlp.experts",
        experts=3,
        hidden=8,
        intermediate=5,
        is_stacked=True,
    )
    pairs = {
        "base_layer": Pair(torch.ones(6, 8), torch.ones(10, 6), 8.0),
        "": Pair(torch.ones(6, 5), torch.ones(8, 6), 8.0),
    }
    found, _ = translate_experts(pairs, mixture, config)
    assert {pair.scaling for pair in found.values()} == {8.0}
