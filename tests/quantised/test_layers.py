"""Tests of LoRA layers on quantised layers, whose kernels may need a GPU.

The slots must equal those on float weights, which ``tests/models`` compares with dense products.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.quantised_layers import FORMATS, MODELS, Format, build, load, save_adapter

import vllm_nway_lora
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.rows.notes import get_notes
from vllm_nway_lora.rows.plan import FusionPlan

FUSED = {
    "Qwen3.5": "language_model.model.layers.0.linear_attn.in_proj_qkvz",
    "Granite 4": "model.layers.0.mamba.in_proj",
}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    vllm_nway_lora.register()
    yield
    vllm_nway_lora.unregister()


def list_slices(plan: FusionPlan) -> list[tuple[object, ...]]:
    return [(s.module, s.rows, s.width, s.offset, s.local.tolist()) for s in plan.slices]


@pytest.mark.parametrize(
    ("rank", "size", "fully_sharded"),
    [(0, 1, False), (1, 2, False), (0, 2, True)],
    ids=["tp1", "tp2", "tp2-sharded"],
)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("model", MODELS)
def test_adapter_is_placed_as_on_float_weights(
    tmp_path: Path, model: str, form: Format, rank: int, size: int, fully_sharded: bool
) -> None:
    adapter = save_adapter(tmp_path / "adapter", model)
    ranks = []
    for name, of in (("float", None), ("quantised", form)):
        (tmp_path / name).mkdir()
        ranks.append(build(tmp_path / name, model, of, rank, size, fully_sharded))
    plain, quantised = (built.lora_manager.modules for built in ranks)

    layer = quantised[FUSED[model]]
    name, dtype = form.parameter
    assert getattr(layer.base_layer, name).dtype == dtype  # it is quantised
    assert isinstance(layer, NWayLinearWithLoRA)
    assert list_slices(layer.plan) == list_slices(plain[FUSED[model]].plan)
    assert get_notes(layer.base_layer).traced is not None

    assert {path: type(layer) for path, layer in quantised.items()} == {
        path: type(layer) for path, layer in plain.items()
    }
    expected, found = (load(built, adapter) for built in ranks)
    assert found.keys() == expected.keys()
    for path, slots in found.items():
        for slot, wanted in zip(slots, expected[path], strict=True):
            assert torch.equal(slot, wanted), path
    assert all(part.any() for part in found[FUSED[model]])
