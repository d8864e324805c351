"""``plan`` and ``check`` say, without weights, what the families' layers then do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from support.families import FAMILIES, Family
from support.verdicts import runs_here, save_adapter, stubbed

from vllm_nway_lora import check

#: Families of which plan and check say less than the table, and why.
ELSEWHERE = {
    "AliceAI": "stock fails at its warm-up, which neither runs",
    "GLM-5-Next": "one layer has two lines in the table, for the module that is refused",
    "DeepSeek-V4.1": "its class computes while it is built, which needs memory",
    "Step5, 8 KV heads": "its indexer's layers are vLLM's own and have no plan",
    "Step5, 2 KV heads": "its indexer's layers are vLLM's own and have no plan",
    "LongCat-Flash": "plan does not list its two attentions' projections",
    "Qwen4-Exp, hyper-connections without padding": "stock ignores when sharded what it refuses else",
    "openPangu with sinks": "its weights are stored under other names than its modules",
}
HERE = [family for family in FAMILIES if runs_here(family) and family.name not in ELSEWHERE]
STOCK_SINCE = Version("0.29.0")  # what the table says of stock vLLM


@pytest.fixture(params=HERE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    with stubbed(request.param):
        (tmp_path / "config.json").write_text(
            json.dumps({"dtype": "float32", **request.param.config})
        )
        yield request.param


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
def test_plan_agrees_with_the_table(
    family: Family, tmp_path: Path, size: int, fully_sharded: bool
) -> None:
    report = check.plan(str(tmp_path), tensor_parallel_size=size, fully_sharded=fully_sharded)
    rows = {row.layer: row for row in report.rows}
    for fused in family.fused:
        row = rows.get(re.sub(r"\b\d+\b", "*", fused.layer))
        if row is None:  # neither packed nor ours: vLLM's plain class has it
            assert fused.plugin == fused.stock[0] == "exact"
            continue
        assert row.plugin.word == fused.plugin
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
        assert module.rpartition(".")[2] in report.plugin.reason
        assert report.stock.word != "exact"
