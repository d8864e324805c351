"""``plan`` and ``check`` say, without weights, what the families' layers then do."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from support.families import FAMILIES, Family
from support.families_qwen3_5 import QWEN3_5_FAMILIES
from support.models import import_classes, save_config
from support.verdicts import WORST_FIRST, runs_here, save_adapter, stubbed

from vllm_nway_lora import check

HERE = [family for family in FAMILIES if runs_here(family)]
STOCK_SINCE = Version("0.29.0")  # what the table says of stock vLLM


@pytest.fixture(params=HERE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    with stubbed(request.param):
        import_classes(request.param.config)
        save_config(tmp_path, request.param.config)
        yield request.param


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
def test_plan_agrees_with_the_table(
    family: Family, tmp_path: Path, size: int, fully_sharded: bool
) -> None:
    report = check.plan(str(tmp_path), tensor_parallel_size=size, fully_sharded=fully_sharded)
    assert report.plugin.word != "fails", report.plugin.reason
    rows = {row.layer: row for row in report.rows}
    for fused in family.fused:
        if fused.called and not fused.loaded:
            continue  # adapters' names match no layer, and so no row
        # A layer that is found under two names (MLA) has its row under the first.
        layer = re.sub(r"\b\d+\b", "*", fused.layer)
        row = rows.get(layer) or rows.get(layer.replace(".mla_attn.", "."))
        if row is None:  # neither packed nor ours: vLLM's plain class has it
            assert fused.plugin == fused.stock[0] == "exact"
            continue
        # A layer has one row, and may have a line in the table for some of its modules each.
        lines = [line for line in family.fused if line.layer == fused.layer]
        assert row.plugin.word == min((line.plugin for line in lines), key=WORST_FIRST.index)
        if Version(vllm.__version__) >= STOCK_SINCE:
            assert row.stock.word == fused.stock[(size > 1) + 2 * fully_sharded], row.stock.reason


def test_check_agrees_with_the_table(family: Family, tmp_path: Path) -> None:
    for fused in family.fused:
        pairs = {
            module: (torch.zeros(8, fused.columns), torch.zeros(rows, 8))
            for module, rows in fused.modules.items()
        }
        save_adapter(tmp_path, pairs)
        report = check.check(str(tmp_path), str(tmp_path), tensor_parallel_size=2)
        assert report.plugin.word == fused.plugin, report.plugin.reason
        # One row too many, which vLLM would cut off or write elsewhere.
        module, (a, b) = next(iter(pairs.items()))
        save_adapter(tmp_path, pairs | {module: (a, torch.cat([b, b[:1]]))})
        report = check.check(str(tmp_path), str(tmp_path), tensor_parallel_size=2)
        assert report.plugin.word == "refused"
        named = (module.rpartition(".")[2], fused.layer.rpartition(".")[2])  # some are renamed
        assert any(name in report.plugin.reason for name in named)
        assert report.stock.word != "exact"


@pytest.mark.skipif(not runs_here(QWEN3_5_FAMILIES[0]), reason="this vLLM has no such class")
def test_a_hundred_layers_and_four_hundred_modules_take_three_seconds(tmp_path: Path) -> None:
    family, layers = QWEN3_5_FAMILIES[0], 100
    kinds = {"num_hidden_layers": layers, "layer_types": ["linear_attention"] * layers}
    save_config(tmp_path, {**family.config, **kinds})
    import_classes(family.config)
    pairs = {
        module.replace(".0.", f".{layer}."): (torch.zeros(8, fused.columns), torch.zeros(rows, 8))
        for layer in range(layers)
        for fused in family.fused
        for module, rows in fused.modules.items()
    }
    assert len(pairs) == 400
    save_adapter(tmp_path, pairs)
    started = time.process_time()  # other processes' work is not ours
    report = check.check(str(tmp_path), str(tmp_path))
    assert time.process_time() - started < 3
    assert [row.count for row in report.rows] == [layers, layers]
    assert report.plugin.word == "exact"
