"""LoRA on models whose classes lack vLLM's flags for it, and what stays as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.families.family import Family
from support.models import RankModel, save_config
from support.verdicts import is_in_installed_vllm, save_adapter, stub_dependencies
from vllm.config import ModelConfig
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models import registry as model_registry
from vllm.model_executor.models.interfaces import supports_lora

import vllm_nway_lora
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.models import switched_on, traced
from vllm_nway_lora.models.without_lora import SWITCHED_ON, is_lora_supported

#: vLLM's words, from 0.33.0 on when it reads the configuration, before when a worker wraps the model.
REFUSAL = "does not support LoRA yet|LoRA is not supported for"


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    offline.initialize()  # loads vLLM's plugins, once
    vllm_nway_lora.unregister()
    vllm_nway_lora.register()
    yield
    vllm_nway_lora.unregister()


@pytest.fixture
def registry() -> Iterator[None]:
    """Restore vLLM's registry of models after the test."""
    entries = dict(ModelRegistry.models)
    yield
    ModelRegistry.models.update(entries)


def find(name: str) -> Family:
    """Return the family of that name; skip the test if the installed vLLM does not have it."""
    [family] = [family for family in FAMILIES if family.name == name]
    if not is_in_installed_vllm(family):
        pytest.skip(f"this release of vLLM has no {name}")
    return family


def build(family: Family) -> RankModel:
    """Return a family's model on one rank, wrapped for LoRA."""
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1)
        rank.wrap()
    return rank


def test_flags_are_set_on_the_instance_alone() -> None:
    family = find("GPT-2")
    rank = RankModel(family.config, 0, 1)
    model: Any = rank.model
    kind = type(model)
    before, entry = dict(vars(kind)), ModelRegistry.models["GPT2LMHeadModel"]
    assert not hasattr(model, "supports_lora")
    rank.wrap()
    assert supports_lora(model)
    assert type(model) is kind
    assert kind.__module__ == "vllm.model_executor.models.gpt2"
    assert dict(vars(kind)) == before
    assert not supports_lora(kind)
    assert ModelRegistry.models["GPT2LMHeadModel"] is entry
    # vLLM's quantisation reads it from the class.
    assert not hasattr(kind, "packed_modules_mapping")


def test_without_the_plugin_vllm_refuses() -> None:
    vllm_nway_lora.unregister()
    with pytest.raises(ValueError, match=REFUSAL):
        build(find("GPT-2"))


def test_class_of_another_package_stays_refused(registry: None) -> None:
    family = find("GPT-2")
    own = offline.import_class("GPT2LMHeadModel")
    other = type("GPT2LMHeadModel", (own,), {"__module__": __name__})
    ModelRegistry.register_model("GPT2LMHeadModel", other)
    with pytest.raises(ValueError, match=REFUSAL):
        build(family)


def test_model_with_vllms_own_lora_gets_no_flags() -> None:
    family = find("Granite 4 hybrid, 1 group")
    rank = RankModel(family.config, 0, 1)
    before = dict(vars(rank.model))
    switched_on.switch_on(rank.model, rank.vllm_config)
    assert dict(vars(rank.model)) == before


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (SimpleNamespace(module_name="vllm.model_executor.models.gpt2", class_name="GPT2LMHeadModel"), True),
        (SimpleNamespace(module_name="another.gpt2", class_name="GPT2LMHeadModel"), False),
        (SimpleNamespace(module_name="vllm.model_executor.models.x", class_name="Unlisted"), False),
        (SimpleNamespace(model_cls=type("Mamba2ForCausalLM", (), {"__module__": "vllm.m"})), True),
        (SimpleNamespace(model_cls=type("Mamba2ForCausalLM", (), {"__module__": "other"})), False),
        (None, False),
    ],
)  # fmt: skip
def test_configuration_is_accepted_for_vllms_own_listed_classes(entry: Any, expected: bool) -> None:
    for stock in (False, True):

        class Config:
            architecture, convert_type = "A", "none"
            registry = SimpleNamespace(models={"A": entry})
            is_lora_supported = is_lora_supported(property(lambda self, stock=stock: stock))

        assert Config().is_lora_supported is (stock or expected)
        Config.convert_type = "embed"
        assert Config().is_lora_supported is stock


def test_what_vllm_keeps_of_the_class_does_not_depend_on_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On, off and on again: vLLM's file about the class is one that it also writes without the plugin."""
    entry = model_registry._LazyRegisteredModel(
        module_name="vllm.model_executor.models.gpt2", class_name="GPT2LMHeadModel"
    )
    files = []
    for number, plugin in enumerate((True, False)):
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / str(number)))
        monkeypatch.setenv("VLLM_NWAY_LORA", str(int(plugin)))
        (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
        assert not getattr(
            entry.inspect_model_cls(), "supports_lora", False
        )  # read in another process
        [file] = (tmp_path / str(number)).rglob("*.json")
        files.append(file.read_bytes())
    assert files[0] == files[1]
    vllm_nway_lora.register()
    with monkeypatch.context() as without_processes:
        without_processes.setattr(model_registry, "_run_in_subprocess", None)
        assert not getattr(entry.inspect_model_cls(), "supports_lora", False)  # from the file


@pytest.mark.skipif(not hasattr(ModelConfig, "is_lora_supported"), reason="new in vLLM 0.33.0")
def test_configuration_is_read_without_model_code(registry: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), find("GPT-2").config)
        offline.import_class("GPT2LMHeadModel")
        config = ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True)
    assert not config._model_info.supports_lora
    assert config.is_lora_supported
    vllm_nway_lora.unregister()
    assert not config.is_lora_supported


MULTIMODAL = (
    *("Kimi K2.5", "Kimi-VL", "Gemma 3n, multimodal", "LLaVA-OneVision", "PaddleOCR-VL"),
    *("Qwen2-Audio", "Command A Vision"),
)


def read_shape(module: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a linear layer's weight, which vLLM may have packed; else None."""
    for rows, columns in (("output_size", "input_size"), ("out_features", "in_features")):
        if hasattr(module, rows):
            return getattr(module, rows), getattr(module, columns)
    return None


@pytest.mark.parametrize("name", MULTIMODAL)
def test_towers_take_no_lora(name: str, tmp_path: Path) -> None:
    rank = build(find(name))
    model: Any = rank.model
    parts = model.get_mm_mapping()
    assert parts.language_model == ["language_model"]
    others = {name for name, _ in model.named_children()} - {"language_model"}
    if not hasattr(
        type(model), "get_mm_mapping"
    ):  # Gemma 3n has one that leaves its audio tower out
        assert set(parts.tower_model) == others
    wrapped = [path for path, m in model.named_modules() if isinstance(m, BaseLayerWithLoRA)]
    assert wrapped
    assert all(path.startswith("language_model.") for path in wrapped)
    layers = {
        path.partition(".")[0]: (path, shape)
        for path, module in model.named_modules()
        if path.startswith(tuple(others)) and (shape := read_shape(module))
    }
    assert layers
    for number, (path, (rows, columns)) in enumerate(layers.values(), 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_adapter(folder, {path: (torch.ones(8, columns), torch.ones(rows, 8))})
        with pytest.raises(ValueError, match="is refused on vLLM"):
            rank.add_adapter("tower", number, folder)


def test_lora_on_towers_is_left_refused() -> None:
    family = find("Kimi-VL")
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1)
        rank.vllm_config.lora_config.enable_tower_connector_lora = True
        with pytest.raises(ValueError, match=REFUSAL):
            rank.wrap()


def test_what_is_not_traced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no twin")

    monkeypatch.setattr(traced, "build_twin", fail)
    family = find("StableLM")
    rank = build(family)
    modules = [module for fused in family.fused for module in fused.modules]
    for number, module in enumerate(modules):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_adapter(folder, {module: (torch.ones(8, 128), torch.ones(64, 8))})
        with pytest.raises(ValueError, match="could not be traced"):
            rank.add_adapter(module, number + 1, folder)


def test_every_class_of_the_table_has_a_family() -> None:
    built = {name for family in FAMILIES for name in family.config.get("architectures", ())}
    classes = {"BailingMoeV2_5ForCausalLM": "BailingMoeV25ForCausalLM"}
    classes |= {"StableLmForCausalLM": "StablelmForCausalLM"}
    assert set(SWITCHED_ON) <= {classes.get(name, name) for name in built}


def test_fewer_tokens_in_the_last_layers_are_left_refused(caplog: pytest.LogCaptureFixture) -> None:
    family = find("StableLM")
    rank = RankModel(family.config, 0, 1)
    rank.vllm_config.cache_config.kv_sharing_fast_prefill = True
    with pytest.raises(ValueError, match=REFUSAL):
        rank.wrap()


def test_constructor_does_not_see_lora_and_the_setting_returns() -> None:
    config = SimpleNamespace(lora_config="on")
    seen = []

    def build(*, vllm_config: Any, fails: bool) -> None:
        seen.append(vllm_config.lora_config)
        if fails:
            raise RuntimeError("no memory")

    switched_on.build_without_lora(build, None, (), {"vllm_config": config, "fails": False})
    with pytest.raises(RuntimeError, match="no memory"):
        switched_on.build_without_lora(build, None, (), {"vllm_config": config, "fails": True})
    assert seen == [None, None]
    assert config.lora_config == "on"
