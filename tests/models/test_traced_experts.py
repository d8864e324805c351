"""Tracing the mixtures of experts of vLLM's own model classes, and what their LoRA layers then serve."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support import mixtures
from support.mixtures import CONFIGS, EXPERTS, HIDDEN, INTERMEDIATE, trace_and_wrap
from support.models import RankModel
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.models import ModelRegistry

from vllm_nway_lora.layers.readers import find_refusals
from vllm_nway_lora.layers.traced_experts import find_difference
from vllm_nway_lora.models import traced
from vllm_nway_lora.rows.notes import get_notes

Weights = Iterable[tuple[str, torch.Tensor]]
AVAILABLE = [name for name in CONFIGS if name in ModelRegistry.models]
PLAIN, STACKED = "Qwen3MoeForCausalLM", "GptOssForCausalLM"


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)], ids=["tp1", "tp2-0", "tp2-1"])
@pytest.mark.parametrize("architecture", AVAILABLE)
def test_vllm_slices_experts_as_their_model_loads_them(
    architecture: str, rank: int, size: int, fully_sharded: bool
) -> None:
    model = mixtures.build(architecture, rank, size)
    try:
        wrapped = trace_and_wrap(model, fully_sharded)
    except AttributeError as error:  # vLLM's own, Llama 4 until 0.24.0
        assert "get_expert_mapping" in str(error)
        pytest.skip("this release has no LoRA on this model")
    assert wrapped
    for layer in wrapped.values():
        mixture = get_notes(layer.base_layer).mixture
        if mixture is None and architecture == STACKED:
            skip_if_unloadable(model)
        assert mixture is not None
        assert find_difference(layer, mixture) == ""
        assert find_refusals(layer) == {}


@pytest.mark.skipif(
    not hasattr(FusedMoEWithLoRA, "ep_rank"),
    reason="this release has no LoRA with expert parallelism",
)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("architecture", [PLAIN, "Qwen3_5MoeForConditionalGeneration"])
def test_experts_of_a_rank_are_traced_with_expert_parallelism(architecture: str, rank: int) -> None:
    model = mixtures.build(architecture, rank, 2, expert_parallel=True)
    for layer in trace_and_wrap(model).values():
        mixture = get_notes(layer.base_layer).mixture
        assert mixture is not None
        assert len(mixture.w13.modules) == EXPERTS // 2
        owner = mixture.w13.experts if mixture.is_stacked else mixture.w13.modules // 3
        assert owner[:, 0].tolist() == [2 * rank, 2 * rank + 1]
        assert find_difference(layer, mixture) == ""


def test_other_layers_are_traced_with_expert_parallelism() -> None:
    """The twin's map of experts has values: a constructor reads them."""
    rank = mixtures.build(PLAIN, 1, 2, expert_parallel=True)
    rank.run_as_rank(lambda: traced.trace_model(rank.model, {}))
    attention = rank.model.get_submodule("model.layers.0.self_attn.o_proj")
    assert get_notes(attention).traced is not None


def test_notes_say_which_row_of_which_expert_is_where() -> None:
    [first, *_] = trace_and_wrap(mixtures.build(PLAIN, 1, 2)).values()
    mixture = get_notes(first.base_layer).mixture
    assert mixture is not None
    assert mixture.kinds == ["gate_proj", "down_proj", "up_proj"]
    half = INTERMEDIATE // 2
    own = list(range(half, INTERMEDIATE))
    assert mixture.w13.rows.tolist() == [own + own]
    assert mixture.w13.modules.tolist() == [
        [3 * e] * half + [3 * e + 2] * half for e in range(EXPERTS)
    ]
    assert mixture.w2.columns.tolist() == [[own, own]]
    assert mixture.w2.modules.tolist() == [[3 * e + 1] * HIDDEN for e in range(EXPERTS)]


def skip_if_unloadable(rank: RankModel) -> None:
    """Skip a test of GPT-OSS where this release cannot load its unquantised checkpoint (0.24.0)."""
    weight = torch.zeros(EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    with contextlib.suppress(KeyError):
        rank.load({"model.layers.0.mlp.experts.gate_up_proj": weight})
        return
    pytest.skip("this release cannot load this model's unquantised checkpoint")


def swap_gate_and_up(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    words = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    *first, kind, last = name.split(".")
    is_expert = "experts" in first
    return ".".join([*first, words.get(kind, kind) if is_expert else kind, last]), weight


def reverse_experts(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    head, found, tail = name.partition(".experts.")
    number, _, rest = tail.partition(".")
    return (f"{head}{found}{EXPERTS - 1 - int(number)}.{rest}" if found else name), weight


def reverse_columns(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, weight.flip(1) if ".experts." in name and "down_proj" in name else weight


def reverse_rows_of_last(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, weight.flip(0) if f".experts.{EXPERTS - 1}.up_proj" in name else weight


def double(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, 2 * weight if ".experts." in name and "gate_proj" in name else weight


def change(
    monkeypatch: pytest.MonkeyPatch, model: Any, how: Callable[[str, torch.Tensor], Any]
) -> None:
    """Let the model's class change names and weights while it loads them."""
    load = type(model).load_weights
    monkeypatch.setattr(
        type(model), "load_weights", lambda self, weights: load(self, (how(*w) for w in weights))
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (swap_gate_and_up, "adds the rows of the experts' gate_proj and up_proj to other modules"),
        (reverse_experts, "adds the rows of the experts' gate_proj and up_proj to other modules"),
        (reverse_columns, "multiplies LoRA-A of the experts' down_proj by other columns"),
        (
            reverse_rows_of_last,
            "puts the rows of the experts' gate_proj and up_proj in other places",
        ),
        (double, "changes the values of its experts' weights"),
    ],
)
def test_mixture_that_loads_otherwise_than_vllm_slices_is_refused(
    monkeypatch: pytest.MonkeyPatch, how: Any, words: str
) -> None:
    rank = mixtures.build(PLAIN, 1, 2)
    change(monkeypatch, rank.model, how)
    wrapped = trace_and_wrap(rank)
    assert len(wrapped) == 3
    for layer in wrapped.values():
        refusals = find_refusals(layer)
        assert {*refusals} == {"gate_proj", "up_proj", "down_proj", "base_layer", "experts"}
        assert words in refusals["gate_proj"]


@pytest.mark.parametrize("along", [1, 2])
def test_mixture_of_stacked_experts_that_loads_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, along: int
) -> None:
    """GPT-OSS copies its experts' weights itself."""
    rank = mixtures.build(STACKED, 0, 1)
    name = "gate_up_proj" if along == 2 else "down_proj"
    change(monkeypatch, rank.model, lambda n, w: (n, w.flip(along) if n.endswith(name) else w))
    wrapped = trace_and_wrap(rank)
    for layer in wrapped.values():
        if get_notes(layer.base_layer).mixture is None and not find_refusals(layer):
            skip_if_unloadable(rank)
        assert {*find_refusals(layer)} == {"base_layer", "experts"}


def test_layer_that_loads_otherwise_than_the_first_stays_by_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = mixtures.build(PLAIN, 0, 1)

    def halve(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
        is_other = "layers.1." in name and ".experts.0.gate_proj" in name
        return name, weight[: len(weight) // 2] if is_other else weight

    change(monkeypatch, rank.model, halve)
    lines: list[str] = []
    monkeypatch.setattr(traced.logger, "info", lambda text, *args: lines.append(text % args))
    trace_and_wrap(rank)
    found = mixtures.find_mixtures(rank.model).values()
    assert [get_notes(layer).mixture is None for layer in found] == [False, True, False]
    assert lines[0].endswith("By table: model.layers.#.mlp.experts.")


def test_mixture_that_cannot_be_traced_stays_by_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank = mixtures.build(PLAIN, 0, 1)

    def fail(name: str, weight: torch.Tensor) -> Any:
        if ".experts.2." in name:
            raise RuntimeError("not these")
        return name, weight

    change(monkeypatch, rank.model, fail)
    caplog.set_level(logging.DEBUG, logger="vllm.nway_lora")
    wrapped = trace_and_wrap(rank)
    for layer in wrapped.values():
        assert get_notes(layer.base_layer).mixture is None
        assert find_refusals(layer) == {}
    attention = rank.model.get_submodule("model.layers.0.self_attn.qkv_proj")
    assert get_notes(attention).traced is not None
