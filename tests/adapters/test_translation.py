"""Tests of layouts on real model classes: the slots are those of the checkpoint's own layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from support.layout_models import MODELS
from support.layout_table import LAYOUTS
from support.layouts import Model, checkpoint
from support.models import RankModel

import vllm_nway_lora

Slots = dict[str, torch.Tensor]
RELEASE = Version(vllm.__version__)


def slots(rank: RankModel, folder: Path) -> Slots | str:
    """Return the slot of an adapter in every layer, or the error's text."""
    try:
        rank.add_adapter("adapter", 1, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    manager = rank.worker_manager._adapter_manager
    slot = manager.lora_index_to_id.index(1)
    found = {}
    for name, layer in manager.modules.items():
        for letter, stack in (("A", layer.lora_a_stacked), ("B", layer.lora_b_stacked)):
            for number, tensor in enumerate(stack if isinstance(stack, tuple) else (stack,)):
                if tensor[slot].any():
                    found[f"{name} {letter}{number}"] = tensor[slot].clone()
    rank.remove_adapter(1)
    return found


def difference(found: Slots | str, expected: Slots) -> str:
    """Return the error, or the slots that are not equal bit for bit; empty if all are."""
    if isinstance(found, str):
        return found
    names = found.keys() ^ expected.keys()
    names |= {n for n in found.keys() & expected.keys() if not torch.equal(found[n], expected[n])}
    return ", ".join(sorted(names))


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize(
    "model", [m for m in MODELS if Version(m.since) <= RELEASE], ids=lambda model: model.name
)
def test_layouts_fill_the_same_slots(
    model: Model, size: int, fully_sharded: bool, tmp_path: Path
) -> None:
    vllm_nway_lora.register()
    reference = checkpoint(model).save(tmp_path / "reference")
    outcomes: dict[str, str] = {}
    for number in range(size):
        rank = RankModel(model.config, number, size, fully_sharded)
        rank.wrap()
        rank.warm_up()
        expected = slots(rank, reference)
        assert isinstance(expected, dict), expected
        assert len(expected) > len(model.modules)
        for index, layout in enumerate(LAYOUTS):
            files = layout.write(model)
            if files is None:
                continue
            folder = tmp_path / f"{number}-{index}"
            found = difference(slots(rank, files.save(folder)), expected)
            if layout.served:
                outcomes[layout.name] = found
            else:
                is_refused = found.startswith("AdapterError") and re.search(layout.reason, found)
                outcomes[layout.name] = "" if is_refused else f"not refused as expected: {found}"
    assert {name: outcome for name, outcome in outcomes.items() if outcome} == {}
