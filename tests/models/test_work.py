"""The work of each family's LoRA layers, counted: the adapter's own, and stock vLLM's times M/N."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from support import work
from support.families import FAMILIES
from support.family import Family, Fused
from support.models import MAX_RANK, RankModel
from support.verdicts import TOKENS, runs_here, stubbed

import vllm_nway_lora
from vllm_nway_lora.layer import NWayLinearWithLoRA

HERE = [family for family in FAMILIES if runs_here(family)]
SIZE = 2
STOCK_STARTS = Version("0.20.0")  # fully sharded, with layers that it has no class for


@pytest.fixture(params=HERE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def build(family: Family, size: int, fully_sharded: bool = False) -> RankModel:
    rank = RankModel(family.config, 0, size, fully_sharded)
    rank.wrap()
    return rank


def ours(family: Family, rank: RankModel) -> list[tuple[Fused, Any]]:
    """Return the family's layers that this package has taken; those that it leaves, vLLM has right."""
    layers = [(fused, rank.model.get_submodule(fused.layer)) for fused in family.fused]
    return [(f, layer) for f, layer in layers if type(layer) is NWayLinearWithLoRA]


def run_lora_part(rank: RankModel, layer: Any, fused: Fused) -> int:
    """Run a layer's LoRA on tokens of one adapter; return its multiply-adds."""
    rank.worker_manager._adapter_manager.lora_index_to_id[0] = 1
    rank.select(1, TOKENS)
    x = torch.ones(TOKENS, fused.columns)
    y = torch.zeros(TOKENS, layer.base_layer.output_size_per_partition)

    def run() -> None:
        with work.without_base(layer, y):
            rank._as_this_rank(lambda: layer(x))

    return work.multiply_adds(run)


@pytest.mark.parametrize("size", [1, SIZE], ids="tp{}".format)
def test_multiply_adds_are_the_adapters_own(family: Family, size: int) -> None:
    vllm_nway_lora.register()
    with stubbed(family):
        rank = build(family, size)
        taken = ours(family, rank)
        names = {fused.layer.rpartition(".")[2] for fused in family.fused}
        assert taken or "in_proj_qkvz" not in names  # so that something is counted
        for fused, layer in taken:
            rows = layer.base_layer.output_size_per_partition
            # All of the layer's, of which a line of the table may have some; vLLM gives padding one.
            modules = len(layer.plan.modules)
            least = work.floor(TOKENS, modules, fused.columns, rows, MAX_RANK)
            assert run_lora_part(rank, layer, fused) == least, fused.layer


def test_memory_and_gathered_bytes_are_m_of_stocks_n(family: Family) -> None:
    found: dict[str, list[tuple[int, int, int]]] = {}
    for plugin in (True, False):
        (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
        with stubbed(family):
            try:
                rank = build(family, SIZE, fully_sharded=True)
            except AssertionError:
                if plugin or Version(vllm.__version__) >= STOCK_STARTS:
                    raise
                break  # nothing to compare with
            for fused in family.fused:
                layer = rank.model.get_submodule(fused.layer)
                if plugin and type(layer) is NWayLinearWithLoRA and layer.shards_lora_a:
                    found[fused.layer] = []
                if fused.layer not in found or not hasattr(layer, "lora_a_stacked"):
                    continue  # vLLM's own, or not wrapped by it
                rank.group.sent.clear()
                run_lora_part(rank, layer, fused)
                slices = len(layer.lora_a_stacked)
                a_bytes = sum(a.nbytes for a in layer.lora_a_stacked)
                found[fused.layer].append((slices, a_bytes, sum(t.nbytes for t in rank.group.sent)))
    for (slices, a_bytes, gathered), *stock in found.values():
        for stocks_slices, stocks_a_bytes, stocks_gathered in stock:
            assert a_bytes * stocks_slices == stocks_a_bytes * slices
            assert gathered * stocks_slices == stocks_gathered * slices > 0
