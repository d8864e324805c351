"""Tests of ``check`` on configurations of quantised checkpoints, whose kernels need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.layout_models import MODELS
from support.layouts import Model, checkpoint
from support.models import import_classes, save_config

from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import Outcome

#: As the configurations of published checkpoints have them.
QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
TEXT = next(model for model in MODELS if model.name == "Llama")
MULTIMODAL = next(model for model in MODELS if model.name == "Qwen3.5 multimodal")


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("model", [TEXT, MULTIMODAL], ids=lambda model: model.name)
def test_an_adapter_on_a_quantised_checkpoint_is_exact(
    tmp_path: Path, model: Model, kind: str
) -> None:
    save_config(tmp_path, {**model.config, "quantization_config": QUANTISED[kind]})
    import_classes(model.config)
    folder = checkpoint(model).save(tmp_path / "adapter")
    report = check_adapter(str(tmp_path), str(folder), ServerOptions(tensor_parallel_size=2))
    assert report.plugin.outcome is Outcome.EXACT, report.plugin
