"""Tests of ``vllm_nway_lora.translate``: the result is served as the original is, by its own config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.layout_models import MODELS
from support.layout_table import LAYOUTS
from support.layouts import Layout, Model, checkpoint
from support.models import import_classes, save_config

import vllm_nway_lora
from vllm_nway_lora.adapters.config import find_rank_and_scaling
from vllm_nway_lora.compat import registration

LLAMA = next(model for model in MODELS if model.name == "Llama")
PHI = next(model for model in MODELS if model.name == "Phi-3")


def deltas(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Return each module's product as PEFT computes it."""
    found = {}
    for name, a in tensors.items():
        module, end, _ = name.partition(".lora_A.weight")
        if end:
            rank, scaling = find_rank_and_scaling(config, module.removeprefix("base_model.model."))
            assert rank == len(a)
            found[module] = scaling * tensors[f"{module}.lora_B.weight"] @ a
    return found


@pytest.mark.parametrize("model", [LLAMA, PHI], ids=lambda model: model.name)
@pytest.mark.parametrize(
    "layout", [of for of in LAYOUTS if of.served], ids=lambda layout: layout.name
)
def test_a_translation_has_the_same_products(model: Model, layout: Layout, tmp_path: Path) -> None:
    files = layout.write(model)
    if files is None:
        return
    save_config(tmp_path, model.config)
    import_classes(model.config)
    expected = checkpoint(model)
    found = vllm_nway_lora.translate(files.tensors, files.config, str(tmp_path))
    products = deltas(expected.tensors, expected.config)
    translated = deltas(found, found.config)
    assert translated.keys() == products.keys()
    assert all(torch.equal(translated[module], products[module]) for module in products)
    # Releases to 0.24.0 do not read the patterns, which files in the checkpoint's layout can have too.
    rules = [rule for rule in found.rules if "rank_pattern" not in rule]
    assert bool(rules) == (files.tensors.keys() != expected.tensors.keys())


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    vllm_nway_lora.unregister()
    save_config(tmp_path, LLAMA.config)
    files = checkpoint(LLAMA)
    vllm_nway_lora.translate(files.tensors, files.config, str(tmp_path))
    assert not registration.applied()


def test_what_has_no_translation_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_config(tmp_path, LLAMA.config)
    files = checkpoint(LLAMA)
    files.tensors["base_model.model.unknown.lora_A.weight"] = torch.ones(6, 64)
    files.tensors["base_model.model.unknown.lora_B.weight"] = torch.ones(64, 6)
    with pytest.raises(ValueError, match="module unknown: this model has no such layer"):
        vllm_nway_lora.translate(files.tensors, files.config, str(tmp_path))


def test_nothing_is_translated_while_the_plugin_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_nway_lora.unregister()
    monkeypatch.setenv("VLLM_NWAY_LORA", "0")
    save_config(tmp_path, LLAMA.config)
    files = checkpoint(LLAMA)
    with pytest.raises(RuntimeError, match="is off in this process"):
        vllm_nway_lora.translate(files.tensors, files.config, str(tmp_path))
