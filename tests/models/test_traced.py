"""Tracing a whole model class: what it notes, and what it leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.models import RankModel
from support.verdicts import stub_dependencies
from torch import nn
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import WeightsMapper

from vllm_nway_lora.models import traced
from vllm_nway_lora.models.names import checkpoint_names
from vllm_nway_lora.models.traced import trace_model
from vllm_nway_lora.rows.notes import LayerNotes, get_notes


@pytest.fixture
def llama4() -> Iterator[RankModel]:
    [family] = [family for family in FAMILIES if family.name == "Llama 4"]
    with stub_dependencies(family):
        yield RankModel(family.config, 1, 2)


MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def notes_of(model: nn.Module) -> dict[str, LayerNotes]:
    return {
        path: get_notes(layer)
        for path, layer in model.named_modules()
        if isinstance(layer, LinearBase)
    }


def test_every_linear_layer_is_traced(llama4: RankModel) -> None:
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    notes = notes_of(llama4.model)
    assert {path for path, note in notes.items() if note.traced is None} == set()
    down = notes["model.layers.0.feed_forward.down_proj"].traced
    assert down is not None
    assert down["down_proj"].columns.tolist() == list(range(32, 64))
    attention = notes["model.layers.1.self_attn.qkv_proj"].traced
    assert attention is not None
    assert attention["q_proj"].rows.tolist()[:9] == [64, 66, 68, 70, 72, 74, 76, 78, 65]


def test_model_configuration_and_process_stay_as_they_were(llama4: RankModel) -> None:
    model, config = llama4.model, llama4.vllm_config
    context = dict(config.compilation_config.static_forward_context)
    mode = config.compilation_config.mode
    ropes = dict(rotary_embedding._ROPE_DICT)
    weights = copy.deepcopy(model.state_dict())
    llama4.run_as_rank(lambda: trace_model(model, MAPPING))
    assert config.compilation_config.static_forward_context == context
    assert config.compilation_config.mode == mode
    assert ropes == rotary_embedding._ROPE_DICT
    assert torch.get_default_dtype() is torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_model_that_cannot_be_built_again_stays_untraced(
    llama4: RankModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(traced.logger, "info", lambda text, *args: lines.append(text % args))

    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(traced, "build_twin", fail)
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    assert all(note.traced is None for note in notes_of(llama4.model).values())
    [line] = lines
    assert "cannot trace Llama4ForCausalLM (RuntimeError: no kernel)" in line


def test_nothing_is_traced_outside_of_an_engine(llama4: RankModel) -> None:
    trace_model(llama4.model, MAPPING)
    assert all(note.traced is None for note in notes_of(llama4.model).values())


@pytest.mark.parametrize(
    ("mapper", "path", "names"),
    [
        (None, "model.proj", ["model.proj"]),
        (WeightsMapper(), "model.proj", ["model.proj"]),
        (
            WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}),
            "language_model.model.proj",
            ["model.language_model.proj", "language_model.model.proj"],
        ),
        # A name of the model's own would be changed again.
        (WeightsMapper(orig_to_new_substr={"mamba": "mamba.mamba"}), "mamba.mamba.x", ["mamba.x"]),
        (WeightsMapper(orig_to_new_prefix={"": "model."}), "model.proj", ["proj"]),
    ],
)
def test_names_of_checkpoints_are_those_that_vllm_maps_to_the_path(
    mapper: WeightsMapper | None, path: str, names: list[str]
) -> None:
    model: Any = nn.Module()
    if mapper is not None:
        model.hf_to_vllm_mapper = mapper
    assert checkpoint_names(model, path) == names
