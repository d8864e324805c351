"""Tests of ``check`` on adapters of experts: vLLM's own LoRA layers judge them, without a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.expert_check import CONFIG, INTERMEDIATE, apart, save, stacked
from support.models import import_classes, save_config
from support.worker import compare
from vllm.lora.model_manager import LoRAModelManager

from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import Outcome

#: What stock vLLM makes of stacked experts for a layer that takes experts apart.
STACKED = (
    Outcome.REFUSED if hasattr(LoRAModelManager, "_validate_moe_lora_format") else Outcome.IGNORED
)


@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize(
    ("tensors", "stock", "plugin", "rule"),
    [
        (apart(), Outcome.EXACT, Outcome.EXACT, ""),
        (stacked(), STACKED, Outcome.EXACT, "split into the modules of 4 experts"),
        (apart(("down_proj",)), Outcome.REFUSED, Outcome.EXACT, "zeros for gate_proj, up_proj"),
        (stacked(INTERMEDIATE // 2), STACKED, Outcome.REFUSED, ""),
    ],
    ids=["apart", "stacked", "down alone", "half as wide"],
)
def test_check_judges_adapters_on_experts(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    stock: Outcome,
    plugin: Outcome,
    rule: str,
    size: int,
) -> None:
    save_config(tmp_path, CONFIG)
    import_classes(CONFIG)
    folder = save(tensors, tmp_path / "adapter")
    options = ServerOptions(tensor_parallel_size=size)
    report = check_adapter(str(tmp_path), str(folder), options)
    assert (report.stock.outcome, report.plugin.outcome) == (stock, plugin), (
        report.stock.reason,
        report.plugin.reason,
    )
    assert rule in "; ".join(report.rules)
    assert bool(rule) == bool(report.rules)
    assert not compare(tmp_path, [folder], options)
