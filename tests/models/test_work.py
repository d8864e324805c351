"""Tests of the arithmetic, memory and gathered bytes of each family's LoRA layers.

The plugin's layers do the minimum of multiply-adds for an adapter. Their memory and gathered bytes are
M/N of stock vLLM's, for M modules and N slices of stock vLLM's layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from support import work
from support.families import FAMILIES
from support.families.family import Family, Fused
from support.families.switched_on import SWITCHED_ON_FAMILIES
from support.models import MAX_RANK, RankModel
from support.verdicts import TOKENS, is_in_installed_vllm, stub_dependencies

import vllm_nway_lora
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA

AVAILABLE = [family for family in FAMILIES if is_in_installed_vllm(family)]
SIZE = 2
#: First release whose stock vLLM starts with ``fully_sharded_loras`` if it has no class for a layer.
STOCK_STARTS = Version("0.20.0")


@pytest.fixture(params=AVAILABLE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def build_rank(family: Family, size: int, fully_sharded: bool = False) -> RankModel:
    """Build rank 0 of a family's model, with LoRA layers."""
    rank = RankModel(family.config, 0, size, fully_sharded)
    rank.wrap()
    return rank


def find_plugin_layers(family: Family, rank: RankModel) -> list[tuple[Fused, Any]]:
    """Return the family's layers that have the plugin's class; stock vLLM serves the others exactly."""
    layers = [(fused, rank.model.get_submodule(fused.layer)) for fused in family.fused]
    return [(f, layer) for f, layer in layers if type(layer) is NWayLinearWithLoRA]


def count_lora_multiply_adds(rank: RankModel, layer: Any, fused: Fused) -> int:
    """Run a layer's LoRA part on tokens of one adapter; return its multiply-adds."""
    rank.worker_manager._adapter_manager.lora_index_to_id[0] = 1
    rank.select_adapter(1, TOKENS)
    x = torch.ones(TOKENS, fused.columns)
    y = torch.zeros(TOKENS, layer.base_layer.output_size_per_partition)

    def run() -> None:
        with work.without_base(layer, y):
            rank.run_as_rank(lambda: layer(x))

    return work.multiply_adds(run)


@pytest.mark.parametrize("size", [1, SIZE], ids="tp{}".format)
def test_layers_do_minimum_of_multiply_adds(family: Family, size: int) -> None:
    vllm_nway_lora.register()
    with stub_dependencies(family):
        rank = build_rank(family, size)
        layers = find_plugin_layers(family, rank)
        names = {fused.layer.rpartition(".")[2] for fused in family.fused}
        assert layers or "in_proj_qkvz" not in names  # the plugin replaces at least these layers
        for fused, layer in layers:
            rows = layer.base_layer.output_size_per_partition
            # Count the plan's modules: a line of the table can have fewer, and padding is a module.
            modules = len(layer.plan.modules)
            minimum = work.floor(TOKENS, modules, fused.columns, rows, MAX_RANK)
            assert count_lora_multiply_adds(rank, layer, fused) == minimum, fused.layer


def test_memory_and_gathered_bytes_scale_with_slices(family: Family) -> None:
    found: dict[str, list[tuple[int, int, int]]] = {}
    # Stock vLLM refuses the families that the plugin switches on.
    for plugin in (True,) if family in SWITCHED_ON_FAMILIES else (True, False):
        (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
        with stub_dependencies(family):
            try:
                rank = build_rank(family, SIZE, fully_sharded=True)
            except AssertionError:
                if plugin or Version(vllm.__version__) >= STOCK_STARTS:
                    raise
                break  # stock vLLM does not start, so nothing can be compared
            for fused in family.fused:
                layer = rank.model.get_submodule(fused.layer)
                if plugin and type(layer) is NWayLinearWithLoRA and layer.shards_lora_a:
                    found[fused.layer] = []
                if fused.layer not in found or not hasattr(layer, "lora_a_stacked"):
                    continue  # the plugin leaves the layer to vLLM, or stock vLLM does not wrap it
                rank.group.sent.clear()
                count_lora_multiply_adds(rank, layer, fused)
                slices = len(layer.lora_a_stacked)
                a_bytes = sum(a.nbytes for a in layer.lora_a_stacked)
                found[fused.layer].append((slices, a_bytes, sum(t.nbytes for t in rank.group.sent)))
    for (slices, a_bytes, gathered), *stock in found.values():
        for stock_slices, stock_a_bytes, stock_gathered in stock:
            assert a_bytes * stock_slices == stock_a_bytes * slices
            assert gathered * stock_slices == stock_gathered * slices > 0
