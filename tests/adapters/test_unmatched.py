"""Modules that no layer uses: refused, left out by a setting, on another rank, or without effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support import manager, tiny
from support.ranks import Ranks
from support.tiny import PREFIX, RANK, SHAPES

LAYER = f"{PREFIX}model.layers.0."
A, B = ".lora_A.weight", ".lora_B.weight"
NOTHING_LEFT = "no module of it is left, so that the base model would answer under its name"
ADVICE = "VLLM_NWAY_LORA=lenient serves adapters without"

Tensors = dict[str, torch.Tensor]


def pair(module: str, columns: int, rows: int) -> Tensors:
    return {
        f"{PREFIX}{module}{A}": torch.ones(RANK, columns),
        f"{PREFIX}{module}{B}": torch.ones(rows, RANK),
    }


def assert_exact(ranks: Ranks, folder: Path) -> None:
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder))


def test_other_pipeline_ranks_and_skipped_prefixes(ranks: Ranks, tmp_path: Path) -> None:
    elsewhere = pair("model.layers.2.mlp.down_proj", 48, 32)
    skipped = pair("mtp.layers.0.mlp.down_proj", 48, 32)
    ranks.run(manager.start)
    assert_exact(ranks, tiny.save(tmp_path / "a", tiny.tensors(0) | elsewhere | skipped))


def test_adapter_of_another_pipeline_rank_alone_is_admitted(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "a", pair("model.layers.2.mlp.down_proj", 48, 32))
    ranks.run(manager.start)
    assert_exact(ranks, folder)
    half = {n: t for n, t in pair("model.layers.2.mlp.up_proj", 32, 48).items() if A in n}
    folder = tiny.save(tmp_path / "b", tiny.tensors(0) | half)
    for error in ranks.run(manager.add, "b", 2, folder):
        assert "module model.layers.2.mlp.up_proj: it has LoRA-A but no LoRA-B" in error


def test_stage_that_this_server_runs_without(ranks: Ranks, tmp_path: Path) -> None:
    audio = pair("audio.attn.proj", 32, 32)
    language = tiny.tensors(0, [m for m in SHAPES if m.startswith("model.layers.")])
    ranks.run(manager.start, multimodal=True)
    assert_exact(ranks, tiny.save(tmp_path / "a", language | audio))


def test_target_modules(ranks: Ranks, tmp_path: Path) -> None:
    if not has_target_modules():
        pytest.skip("this release has no target_modules")
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    ranks.run(manager.start, target_modules=["qkv_proj", "o_proj"])
    ranks.run(manager.said, logging.WARNING)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    for [warning] in ranks.run(manager.said, logging.WARNING):
        assert "is served without" in warning
        assert "model.layers.1.mlp.down_proj, " in warning
        assert "--lora-target-modules does not name them" in warning
        assert "q_proj" not in warning
    folder = tiny.save(tmp_path / "b", tiny.tensors(0, [m for m in SHAPES if "down_proj" in m]))
    for error in ranks.run(manager.add, "b", 2, folder):
        assert NOTHING_LEFT in error
        assert "--lora-target-modules does not name them: model.layers.0.mlp.down_proj, " in error
    assert ranks.run(manager.said, logging.WARNING) == [[]] * ranks.size


def test_towers_without_lora(ranks: Ranks, tmp_path: Path) -> None:
    tower = pair("visual.attn.proj", 32, 32)
    language = tiny.tensors(0, [m for m in SHAPES if m.startswith("model.layers.")])
    ranks.run(manager.start, multimodal=True)
    ranks.run(manager.said, logging.WARNING)
    folder = tiny.save(tmp_path / "a", language | tower)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    for [warning] in ranks.run(manager.said, logging.WARNING):
        assert "is served without visual.attn.proj: this server has no LoRA on that part" in warning


@pytest.mark.parametrize("tower", ["visual", "model.visual", "visual.merger"])
def test_tower_with_other_modules_than_vllms_is_left_out(
    ranks: Ranks, tmp_path: Path, tower: str
) -> None:
    language = tiny.tensors(0, [m for m in SHAPES if m.startswith("model.layers.")])
    ranks.run(manager.start, multimodal=True)
    ranks.run(manager.said, logging.WARNING)
    folder = tiny.save(tmp_path / "a", language | pair(f"{tower}.layers.0.q_proj", 32, 32))
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    for [warning] in ranks.run(manager.said, logging.WARNING):
        assert f"is served without {tower}.layers.0.q_proj: this server has no LoRA on" in warning
    folder = tiny.save(tmp_path / "b", language | pair("visua.layers.0.q_proj", 32, 32))
    for error in ranks.run(manager.add, "b", 2, folder):
        assert "module visua.layers.0.q_proj: this model has no such layer" in error


def test_named_tower_without_lora_is_left_out_for_its_own_reason(
    ranks: Ranks, tmp_path: Path
) -> None:
    if not has_target_modules():
        pytest.skip("this release has no target_modules")
    tensors = tiny.tensors(0, ["model.layers.0.self_attn.o_proj"])
    folder = tiny.save(tmp_path / "a", tensors | pair("visual.attn.proj", 32, 32))
    ranks.run(manager.start, multimodal=True, target_modules=["proj", "o_proj"])
    ranks.run(manager.said, logging.WARNING)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    for [warning] in ranks.run(manager.said, logging.WARNING):
        assert "is served without visual.attn.proj: this server has no LoRA on that part" in warning


def test_language_layer_without_lora_is_not_left_out(ranks: Ranks, tmp_path: Path) -> None:
    """From memory: vLLM checks only the modules of files by name."""
    language = tiny.tensors(0, [m for m in SHAPES if m.startswith("model.layers.")])
    folder = tiny.save(tmp_path / "a", language | pair("model.layers.0.mlp", 32, 32))
    ranks.run(manager.start, multimodal=True, delivery="method before")
    for error in ranks.run(manager.add, "a", 1, folder):
        assert "module model.layers.0.mlp: vLLM would ignore it, because its layer" in error


def test_adapter_on_fused_layer_that_vllm_does_not_wrap_is_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    try:
        wrapped = ranks.run(manager.start, unwrappable=True)
    except RuntimeError as error:
        assert "must be a BaseLayerWithLoRA" in str(error)  # until 0.19.1 the engine does not start
        return
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    assert any("gate_up_proj" in name for name in wrapped[0]) == (ranks.size == 1)
    if ranks.size == 1:  # vLLM wraps the subclass where it is not sharded
        assert_exact(ranks, folder)
        return
    for error in ranks.run(manager.add, "a", 1, folder):
        assert (
            "module model.layers.0.mlp.gate_proj: vLLM would ignore it, because its layer "
            "model.layers.0.mlp.gate_up_proj (GateUp) takes no LoRA"
        ) in error
        assert ADVICE in error


@pytest.mark.parametrize("zero", [A, B])
def test_module_without_a_layer_that_adds_nothing_is_no_loss(
    ranks: Ranks, tmp_path: Path, zero: str
) -> None:
    extra = pair("model.layers.7.self_attn.q_proj", 32, 32)
    extra = {name: t * 0 if name.endswith(zero) else t for name, t in extra.items()}
    ranks.run(manager.start)
    ranks.run(manager.said, logging.WARNING)
    assert_exact(ranks, tiny.save(tmp_path / "a", tiny.tensors(0) | extra))
    assert ranks.run(manager.said, logging.WARNING) == [[]] * ranks.size
    folder = tiny.save(tmp_path / "b", extra)
    for error in ranks.run(manager.add, "b", 2, folder):
        assert NOTHING_LEFT in error


def test_keys_and_values_of_another_layer_are_no_loss(ranks: Ranks, tmp_path: Path) -> None:
    """Gemma 4's last layers from 0.30.0 on: ``q_proj`` alone, keys and values of an earlier layer."""
    ranks.run(manager.start, kv_shared=True)
    folder = tiny.save(tmp_path / "a", tiny.tensors(0))
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, folder, ["1.self_attn.k_proj", "1.self_attn.v_proj"]))
    for module in (
        "model.k_proj",
        "model.layers.7.self_attn.k_proj",
        "model.layers.1.self_attn.up_proj",
    ):
        folder = tiny.save(tmp_path / "b", tiny.tensors(0) | pair(module, 32, 16))
        for error in ranks.run(manager.add, "b", 2, folder):
            assert f"module {module}: this model has no such layer" in error


@pytest.mark.parametrize("mode", ["1", "strict", "lenient"])
def test_adapter_of_which_nothing_is_left_is_refused(
    ranks: Ranks, tmp_path: Path, mode: str
) -> None:
    tensors = {}
    for layer in range(4, 12):
        tensors |= pair(f"model.layers.{layer}.self_attn.q_proj", 32, 32)
    folder = tiny.save(tmp_path / "a", tensors)
    ranks.run(manager.start, mode=mode)
    for error in ranks.run(manager.add, "a", 1, folder):
        assert NOTHING_LEFT in error
        assert error.count("q_proj: this model has no such layer; ") == 4
        assert "; and 4 more. Correct the adapter" in error
        assert ADVICE not in error
    assert not any(ranks.run(manager.has, 1))


def test_lenient_mode_serves_the_rest_and_logs_what_it_drops(ranks: Ranks, tmp_path: Path) -> None:
    extra = pair("model.layers.7.self_attn.q_proj", 32, 32)
    folder = tiny.save(tmp_path / "a", tiny.tensors(0) | extra)
    ranks.run(manager.start, mode="lenient")
    ranks.run(manager.said, logging.WARNING)
    assert ranks.run(manager.add, "a", 1, folder) == [""] * ranks.size
    for [warning] in ranks.run(manager.said, logging.WARNING):
        assert (
            "served without part of it, because VLLM_NWAY_LORA=lenient: module model.layers.7."
            in (warning)
        )
    # A module that has a layer must still fit it.
    short = {f"{LAYER}self_attn.q_proj{B}": torch.ones(31, RANK)}
    folder = tiny.save(tmp_path / "b", tiny.tensors(0) | extra | short)
    for error in ranks.run(manager.add, "b", 2, folder):
        assert "expected LoRA-A (r, 32) and LoRA-B (32, r), found (4, 32) and (31, 4)" in error
        assert ADVICE not in error


def test_advice_is_given_only_if_it_helps(ranks: Ranks, tmp_path: Path) -> None:
    extra = pair("model.layers.7.self_attn.q_proj", 32, 32)
    folder = tiny.save(tmp_path / "a", tiny.tensors(0) | extra)
    ranks.run(manager.start)
    assert all(ADVICE in error for error in ranks.run(manager.add, "a", 1, folder))
    short = {f"{LAYER}self_attn.q_proj{B}": torch.ones(31, RANK)}
    folder = tiny.save(tmp_path / "b", tiny.tensors(0) | extra | short)
    assert not any(ADVICE in error for error in ranks.run(manager.add, "b", 2, folder))


def has_target_modules() -> bool:
    from vllm.config.lora import LoRAConfig

    return "target_modules" in LoRAConfig.__dataclass_fields__
