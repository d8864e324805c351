"""Tracing a whole model class: what it notes, and what it leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.families.qwen3_5 import QWEN3_5_FAMILIES
from support.models import RankModel
from support.verdicts import is_in_installed_vllm, stub_dependencies
from torch import nn
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import WeightsMapper

from vllm_nway_lora.models import tables, traced
from vllm_nway_lora.models.names import checkpoint_names
from vllm_nway_lora.models.traced import trace_model
from vllm_nway_lora.rows.notes import LayerNotes, get_notes
from vllm_nway_lora.rows.twin import build_twin


@pytest.fixture
def llama4() -> Iterator[RankModel]:
    [family] = [family for family in FAMILIES if family.name == "Llama 4"]
    with stub_dependencies(family):
        yield RankModel(family.config, 1, 2)


QKVZ_FAMILIES = [
    family
    for family in QWEN3_5_FAMILIES
    if is_in_installed_vllm(family) and any("in_proj_qkvz" in f.layer for f in family.fused)
]
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
    registries = {
        name: copy.copy(value)
        for name, value in vars(config.compilation_config).items()
        if isinstance(value, (dict, list, set))
    }
    mode = config.compilation_config.mode
    hf_config = config.model_config.hf_config.to_dict()
    ropes = dict(rotary_embedding._ROPE_DICT)
    weights = copy.deepcopy(model.state_dict())
    llama4.run_as_rank(lambda: trace_model(model, MAPPING))
    assert {name: vars(config.compilation_config)[name] for name in registries} == registries
    assert config.model_config.hf_config.to_dict() == hf_config
    assert config.quant_config is None
    assert config.compilation_config.mode == mode
    assert ropes == rotary_embedding._ROPE_DICT
    assert torch.get_default_dtype() is torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_constructor_of_the_twin_changes_copies(
    llama4: RankModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of experts add their names to a list, and some classes change the model's config."""
    config = llama4.vllm_config
    config.compilation_config.static_all_moe_layers.append("first")

    def construct(vllm_config: Any, model_class: type) -> nn.Module:
        assert model_class is type(llama4.model)
        vllm_config.compilation_config.static_all_moe_layers.append("twin's")
        vllm_config.compilation_config.static_forward_context["twin's"] = object()
        vllm_config.model_config.hf_config.num_hidden_layers *= 2
        assert (
            vllm_config.model_config.hf_text_config.num_hidden_layers
            == vllm_config.model_config.hf_config.num_hidden_layers
        )
        return nn.Module()

    monkeypatch.setattr("vllm.model_executor.model_loader.utils.initialize_model", construct)
    layers = config.model_config.hf_config.num_hidden_layers
    llama4.run_as_rank(lambda: build_twin(llama4.model, config))
    assert config.compilation_config.static_all_moe_layers == ["first"]
    assert "twin's" not in config.compilation_config.static_forward_context
    assert config.model_config.hf_config.num_hidden_layers == layers


@pytest.mark.skipif(not QKVZ_FAMILIES, reason="this vLLM has no such layer")
def test_outputs_of_modules_are_read_from_the_shard_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the table: Qwen3.5 has two modules and four outputs."""
    monkeypatch.setattr(tables, "OUTPUTS", {})
    family = QKVZ_FAMILIES[0]
    fused = next(f for f in family.fused if f.layer.endswith("in_proj_qkvz"))
    with stub_dependencies(family):
        rank = RankModel(family.config, 1, 2)
        mapping = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
        rank.run_as_rank(lambda: trace_model(rank.model, mapping))
    held = get_notes(rank.model.get_submodule(fused.layer)).traced
    assert held is not None
    assert {f".{module}": part.size for module, part in held.items()} == {
        module[module.rindex(".") :]: rows for module, rows in fused.modules.items()
    }
    assert held["in_proj_z"].rows.max() == held["in_proj_z"].size - 1


def test_module_whose_values_its_model_changes_is_refused(
    llama4: RankModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muse Spark folds a factor into its router's weight."""
    model_class: Any = type(llama4.model)
    load = model_class.load_weights

    def scale(self: nn.Module, weights: Any) -> Any:
        return load(self, ((n, w * 3 if "o_proj" in n else w) for n, w in weights))

    monkeypatch.setattr(model_class, "load_weights", scale)
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    notes = notes_of(llama4.model)
    refused = {path: note.refusals for path, note in notes.items() if note.refusals}
    assert set(refused) == {f"model.layers.{n}.self_attn.o_proj" for n in range(2)}
    for path, refusals in refused.items():
        assert "changes the values of its weight" in refusals["o_proj"]
        assert notes[path].traced is None
    assert notes["model.layers.0.self_attn.qkv_proj"].traced is not None


def test_embeddings_are_traced(llama4: RankModel) -> None:
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    for path in ("model.embed_tokens", "lm_head"):
        notes = get_notes(llama4.model.get_submodule(path))
        assert notes.traced is not None
        [held] = notes.traced.values()
        assert held.rows.tolist() == list(range(64, 128))
        assert notes.refusals == {}


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_embedding_that_its_model_reorders_is_refused(
    llama4: RankModel, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    model_class: Any = type(llama4.model)
    load = model_class.load_weights

    def reorder(self: nn.Module, weights: Any) -> Any:
        return load(self, ((n, w.flip(0) if path in n else w) for n, w in weights))

    monkeypatch.setattr(model_class, "load_weights", reorder)
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    name = path.rpartition(".")[2]
    holder = "logits_processor" if name == "lm_head" else path
    assert "reorders the vocabulary" in get_notes(llama4.model.get_submodule(holder)).refusals[name]


def test_layer_of_another_shape_than_the_twins_stays_untraced(llama4: RankModel) -> None:
    layer = llama4.model.get_submodule("model.layers.0.self_attn.qkv_proj")
    layer.output_size_per_partition += 8
    llama4.run_as_rank(lambda: trace_model(llama4.model, MAPPING))
    assert get_notes(layer).traced is None


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
        (WeightsMapper(orig_to_new_substr={".fc1.": ".mlp.fc1."}), "x.mlp.fc1", ["x.fc1"]),
    ],
)
def test_names_of_checkpoints_are_those_that_vllm_maps_to_the_path(
    mapper: WeightsMapper | None, path: str, names: list[str]
) -> None:
    model: Any = nn.Module()
    if mapper is not None:
        model.hf_to_vllm_mapper = mapper
    assert checkpoint_names(model, path) == names
