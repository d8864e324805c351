"""Adapters on mixtures whose trace differs from the slots of vLLM's LoRA layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import vllm
from support.moe import EXPERTS, HIDDEN, INTERMEDIATE, Experts, flat, per_expert
from vllm.lora import utils, worker_manager  # noqa: F401  (applies the patches)

import vllm_nway_lora
from vllm_nway_lora.layers.claims import plan_against_stock
from vllm_nway_lora.layers.traced_experts import find_difference
from vllm_nway_lora.rows.experts import Grid, HeldExperts, LoadStyle
from vllm_nway_lora.rows.notes import get_notes, set_notes

LOCAL = INTERMEDIATE // 2  # this rank is the second of two


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    vllm_nway_lora.register()


def hold(stacked: bool, interleaved: bool = False) -> HeldExperts:
    """Return what a rank holds if its model loads the experts in order."""
    own, hidden = torch.arange(LOCAL, INTERMEDIATE), torch.arange(HIDDEN)
    experts = torch.arange(EXPERTS).unsqueeze(1)
    if stacked:
        kinds = ["base_layer", "experts"]
        shapes = [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        rows = torch.cat([own, own + INTERMEDIATE])
        rows = torch.arange(INTERMEDIATE, 2 * INTERMEDIATE) if interleaved else rows
        modules = torch.zeros(EXPERTS, 2 * LOCAL, dtype=torch.int64)
        down = torch.ones(EXPERTS, HIDDEN, dtype=torch.int64)
    else:
        kinds = ["gate_proj", "down_proj", "up_proj"]
        shapes = [(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
        rows = torch.cat([own, own])
        modules = 3 * experts + torch.tensor([0] * LOCAL + [2] * LOCAL)
        down = (3 * experts + 1).expand(-1, HIDDEN)
    number = experts if stacked else torch.zeros_like(experts)
    return HeldExperts(
        kinds,
        shapes,
        Grid(modules, number.expand(-1, 2 * LOCAL), rows[None], hidden.expand(1, 2, -1)),
        Grid(down, number.expand(-1, HIDDEN), hidden[None], own.expand(1, 2, -1)),
        stacked,
        LoadStyle(False, False),
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_mixture_that_vllm_slices_as_its_model_loads_it_is_served(stacked: bool) -> None:
    experts = Experts(stacked=stacked, tp=(1, 2))
    base = experts.layer.base_layer
    set_notes(base, mixture=hold(stacked))
    assert find_difference(experts.layer, hold(stacked)) == ""
    assert plan_against_stock(base, [], experts.layer) is None
    assert get_notes(base).refusals == {}
    assert experts.add(flat() if stacked else per_expert()) == ""


def test_stacked_experts_are_interleaved_for_gpt_oss_only() -> None:
    other = Experts(stacked=True, tp=(1, 2))
    assert "in other places" in find_difference(other.layer, hold(True, interleaved=True))
    gpt_oss = Experts(stacked=True, tp=(1, 2), architecture="GptOssForCausalLM")
    assert find_difference(gpt_oss.layer, hold(True, interleaved=True)) == ""


@pytest.mark.parametrize("stacked", [False, True])
def test_adapter_on_a_mixture_that_loads_otherwise_is_refused(stacked: bool) -> None:
    """Without the trace it is served, with other experts' LoRA on each expert."""
    tensors = flat() if stacked else per_expert()
    assert Experts(stacked=stacked, tp=(1, 2)).add(tensors) == ""
    experts = Experts(stacked=stacked, tp=(1, 2))
    base, mixture = experts.layer.base_layer, hold(stacked)
    changed = "experts" if stacked else "modules"
    w13 = dataclasses.replace(mixture.w13, **{changed: getattr(mixture.w13, changed).flip(0)})
    mixture = dataclasses.replace(mixture, w13=w13)
    set_notes(base, mixture=mixture)
    plan_against_stock(base, [], experts.layer)
    message = experts.add(tensors)
    assert "is refused" in message
    assert "to other modules or experts than those that the model" in message


@pytest.mark.parametrize("stacked", [False, True])
def test_mixture_whose_kernel_pads_its_weights_is_not_compared(stacked: bool) -> None:
    experts = Experts(stacked=stacked, tp=(1, 2), padded=(HIDDEN, 2 * LOCAL))
    with pytest.raises(ValueError, match="other sizes than vLLM's slots"):
        find_difference(experts.layer, hold(stacked))
    base = experts.layer.base_layer
    set_notes(base, mixture=hold(stacked))
    plan_against_stock(base, [], experts.layer)
    assert get_notes(base).refusals == {}


@pytest.mark.skipif(
    not hasattr(vllm.lora.layers.FusedMoEWithLoRA, "ep_rank"),
    reason="this vLLM has no LoRA with expert parallelism",
)
def test_experts_of_another_rank_are_told_apart() -> None:
    experts = Experts(ep_rank=1)
    local = EXPERTS // 2
    mixture = hold(False)
    own, hidden = torch.arange(INTERMEDIATE), torch.arange(HIDDEN)
    numbers = torch.arange(local, EXPERTS).unsqueeze(1)
    zeros = torch.zeros(local, 1, dtype=torch.int64)

    def grids(numbers: torch.Tensor) -> HeldExperts:
        return HeldExperts(
            mixture.kinds,
            mixture.shapes,
            Grid(
                3 * numbers + torch.tensor([0] * INTERMEDIATE + [2] * INTERMEDIATE),
                zeros.expand(-1, 2 * INTERMEDIATE),
                torch.cat([own, own])[None],
                hidden.expand(1, 2, -1),
            ),
            Grid(
                (3 * numbers + 1).expand(-1, HIDDEN),
                zeros.expand(-1, HIDDEN),
                hidden[None],
                own.expand(1, 2, -1),
            ),
            False,
            LoadStyle(False, False),
        )

    assert find_difference(experts.layer, grids(numbers)) == ""
    assert "to other modules" in find_difference(experts.layer, grids(2 * numbers - EXPERTS + 1))
