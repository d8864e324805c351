"""Tests of an engine with quantised weights, for the suites that start one; ``run`` is their fixture.

The engines run with ``fully_sharded_loras``. The reference is PEFT on the same weights in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.adapters import (
    ATTENTION,
    GDN,
    MLP,
    Answer,
    Comparison,
    Reference,
    ServedModel,
    prompts,
    save_adapter,
)
from support.checkpoints import save_falcon_h1, save_granite_hybrid, save_qwen3_5
from support.offline import complete_with_adapters
from support.predictions import predict_outcomes
from support.quantised_checkpoints import Layout, save_quantised
from vllm_nway_lora.diagnosis.report import Outcome

#: Rounding of bfloat16 in the base model's logprobs. Adapters change them by 1 or more.
NOISE = 0.2
#: The CPU kernel takes widths that are multiples of 32, so `in_proj` is wider than elsewhere in the tests.
_GRANITE = {"mamba_n_heads": 64, "mamba_d_head": 16, "mamba_expand": 8}
_QWEN_ADAPTERS = {
    "qkv+z": ("in_proj_qkv", "in_proj_z"),
    "qkv": ("in_proj_qkv",),
    "z": ("in_proj_z",),
    "b+a": ("in_proj_b", "in_proj_a"),
    "all": (*GDN, *ATTENTION, *MLP),
}
_GRANITE_ADAPTERS = {
    "in_proj": ("in_proj",),
    "shared_mlp": ("input_linear", "output_linear"),
    "all": ("in_proj", "out_proj", "input_linear", "output_linear", *ATTENTION),
}
_FALCON_ADAPTERS = {
    "in_proj": ("in_proj",),
    # PEFT refuses out_proj on this model: transformers' kernel reads its weight.
    "all": ("in_proj", *ATTENTION, *MLP),
}


@dataclass(frozen=True)
class Model:
    """A model and its adapters: name -> modules."""

    save: Callable[..., Path]
    adapters: Mapping[str, Sequence[str]]


MODELS = {
    "Qwen3.5": Model(save_qwen3_5, _QWEN_ADAPTERS),
    "Granite 4": Model(functools.partial(save_granite_hybrid, **_GRANITE), _GRANITE_ADAPTERS),
    # On two ranks: vLLM loads a packed `in_proj` of Mamba2 only if the ranks divide its groups.
    "Falcon-H1": Model(save_falcon_h1, _FALCON_ADAPTERS),
}


@dataclass(frozen=True)
class Run:
    """A quantised model and what an engine has answered; under "" without an adapter."""

    model: ServedModel
    tensor_parallel_size: int
    answers: dict[str, Answer | str]
    log: Path

    def compare(self, name: str) -> Comparison:
        """Return the comparison of an answer with the reference."""
        answer = self.answers[name]
        assert isinstance(answer, Answer), answer
        return self.model.reference.compare(name or None, answer)


def save_model(root: Path, model: Model, layout: Layout) -> ServedModel:
    """Save a quantised model and its adapters below ``root``."""
    quantised, floats = save_quantised(model.save(root / "model"), root, layout)
    adapters = {
        name: save_adapter(floats, root / name, modules, seed)
        for seed, (name, modules) in enumerate(model.adapters.items())
    }
    return ServedModel(quantised, adapters, Reference(floats, adapters))


def run_engine(root: Path, name: str, layout: Layout, tensor_parallel_size: int) -> Run:
    """Save a model of :data:`MODELS` and serve it with its adapters."""
    model = save_model(root, MODELS[name], layout)
    log = root / "log"
    with pytest.MonkeyPatch.context() as patch:
        # Processors with AMX would otherwise round the activations to eight bits.
        patch.setenv("VLLM_CPU_INT4_W4A8", "0")
        answers = complete_with_adapters(
            model.folder,
            model.adapters,
            prompts(1)[0],
            log,
            plugin=True,
            tensor_parallel_size=tensor_parallel_size,
        )
    return Run(model, tensor_parallel_size, answers, log)


class EngineChecks:
    """The tests of one engine."""

    def test_every_adapter_equals_peft(
        self, run: Run, record_property: Callable[[str, Any], None]
    ) -> None:
        found = {name: run.compare(name) for name in run.model.adapters}
        record_property("comparisons", found)  # for pytest's --junitxml
        assert all(comparison.is_exact for comparison in found.values()), found

    def test_base_model_equals_transformers(self, run: Run) -> None:
        """The engine has the quantised weights: a float copy of the model answers otherwise."""
        comparison = run.compare("")
        assert max(comparison.error, comparison.greedy_gap) < NOISE, comparison

    def test_check_predicts_every_adapter(self, run: Run) -> None:
        predicted = predict_outcomes(
            run.model.folder,
            run.model.adapters,
            ["--fully-sharded-loras"],
            plugin=True,
            tensor_parallel_size=run.tensor_parallel_size,
        )
        assert predicted == dict.fromkeys(run.model.adapters, Outcome.EXACT)
