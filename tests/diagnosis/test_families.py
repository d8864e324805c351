"""Tests that ``plan`` and ``check``, which need no weights, agree with the table of families."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from support.families import FAMILIES, Family
from support.families.qwen3_5 import QWEN3_5_FAMILIES
from support.models import import_classes, save_config
from support.verdicts import is_in_installed_vllm, save_adapter, stub_dependencies

from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.plan import plan_model
from vllm_nway_lora.diagnosis.report import Outcome

AVAILABLE = [family for family in FAMILIES if is_in_installed_vllm(family)]
TWO_RANKS = ServerOptions(tensor_parallel_size=2)
#: Families whose tiny configuration has no layer that vLLM's class requires (experts, a tower, a file of
#: the tokenizer). A published configuration has it.
TINY = (
    "ColQwen3.5",
    "GLM-4-MoE-Lite",
    "Gemma 3n, multimodal",
    "K2-Horizon",
    "LongCat-Flash",
    "Muse Spark",
    "Nemotron-H Nano VL",
    "Qwen3-Next",
    "Transformers backend, two merged layers",
)
#: Families whose class asks for a GPU's kernels; ``check`` and ``plan`` say that they cannot tell.
FOR_A_GPU = ("DeepSeek-V4", "Qwen4-Exp", "Step5")
STOCK_SINCE = Version("0.29.0")  # the table has stock vLLM's outcomes from this release on


@pytest.fixture(params=AVAILABLE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    family: Family = request.param
    with stub_dependencies(family) if _needs_stubs(family) else nullcontext():
        import_classes(family.config)
        save_config(tmp_path, family.config)
        yield family


def _needs_stubs(family: Family) -> bool:
    return family.name.startswith((*TINY, *FOR_A_GPU))


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
def test_plan_agrees_with_table(
    family: Family, tmp_path: Path, size: int, fully_sharded: bool
) -> None:
    report = plan_model(
        str(tmp_path), ServerOptions(tensor_parallel_size=size, fully_sharded_loras=fully_sharded)
    )
    assert report.plugin.outcome is not Outcome.FAILS, report.plugin.reason
    for fused in family.fused:
        if fused.called and not fused.loaded:
            continue  # no layer has the names of these modules, so there is no row
        # A layer that the model has at two paths (MLA) has its row under the first one.
        layer = re.sub(r"\b\d+\b", "*", fused.layer)
        paths = (layer, layer.replace(".mla_attn.", "."))
        rows = [row for row in report.rows if row.layer in paths]
        # Gemma 4's layers of two kinds have different modules.
        names = {module.rpartition(".")[2] for module in fused.modules}
        row = next((row for row in rows if set(row.modules) == names), rows[0] if rows else None)
        if row is None:  # neither packed nor the plugin's: vLLM's plain class serves it
            assert fused.plugin is fused.stock[0] is Outcome.EXACT
            continue
        # A layer has one row, but can have several lines in the table, each with some of its modules.
        lines = [line for line in family.fused if line.layer == fused.layer]
        found = row.plugin.outcome
        if (
            set(row.modules) != names and len(rows) > 1
        ):  # DeepSeek-V4.1's compressors without a gate
            found = Outcome.worst(other.plugin.outcome for other in rows)
        assert found is Outcome.worst(line.plugin for line in lines)
        if Version(vllm.__version__) >= STOCK_SINCE:
            mode = (size > 1) + 2 * fully_sharded
            assert row.stock.outcome is fused.stock[mode], row.stock.reason


def test_check_agrees_with_table(family: Family, tmp_path: Path) -> None:
    for fused in family.fused:
        pairs = {
            module: (torch.zeros(8, fused.columns), torch.zeros(rows, 8))
            for module, rows in fused.modules.items()
        }
        save_adapter(tmp_path, pairs)
        report = check_adapter(str(tmp_path), str(tmp_path), TWO_RANKS)
        assert report.plugin.outcome is fused.plugin, report.plugin.reason
        # One extra row of LoRA-B; stock vLLM would drop it or write it into another module's rows.
        module, (a, b) = next(iter(pairs.items()))
        save_adapter(tmp_path, pairs | {module: (a, torch.cat([b, b[:1]]))})
        report = check_adapter(str(tmp_path), str(tmp_path), TWO_RANKS)
        assert report.plugin.outcome is Outcome.REFUSED
        # Models rename some modules, so the reason names the module or its layer.
        names = (module.rpartition(".")[2], fused.layer.rpartition(".")[2])
        assert any(name in report.plugin.reason for name in names)
        assert report.stock.outcome is not Outcome.EXACT


@pytest.mark.parametrize(
    "family",
    [family for family in AVAILABLE if family.name.startswith(FOR_A_GPU)],
    ids=lambda family: family.name,
)
def test_a_class_for_a_gpu_is_not_judged(family: Family, tmp_path: Path) -> None:
    if "DeepseekV41LLMForCausalLM" in family.config["architectures"]:
        pytest.skip("vLLM registers this class on a GPU only")
    save_config(tmp_path, family.config)
    report = plan_model(str(tmp_path))
    assert report.plugin.outcome is report.stock.outcome is Outcome.UNKNOWN, report.plugin
    assert "this machine" in report.plugin.reason or "this platform" in report.plugin.reason


@pytest.mark.skipif(
    not is_in_installed_vllm(QWEN3_5_FAMILIES[0]), reason="this vLLM has no such class"
)
def test_check_of_100_layers_and_400_modules_takes_under_3_seconds(tmp_path: Path) -> None:
    family, layers = QWEN3_5_FAMILIES[0], 100
    config = {"num_hidden_layers": layers, "layer_types": ["linear_attention"] * layers}
    save_config(tmp_path, {**family.config, **config})
    import_classes(family.config)
    pairs = {
        module.replace(".0.", f".{layer}."): (torch.zeros(8, fused.columns), torch.zeros(rows, 8))
        for layer in range(layers)
        for fused in family.fused
        for module, rows in fused.modules.items()
    }
    assert len(pairs) == 400
    save_adapter(tmp_path, pairs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread that waits for a busy core counts as CPU time
    seconds = []
    try:
        for _ in range(5):  # a busy machine takes up to three times as long for the same work
            started = time.process_time()  # CPU time of this process: others must not count
            report = check_adapter(str(tmp_path), str(tmp_path))
            seconds.append(time.process_time() - started)
            if seconds[-1] < 3:
                break
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 3, seconds
    assert [row.count for row in report.rows] == [layers, layers]
    assert report.plugin.outcome is Outcome.EXACT


def test_check_knows_a_weight_that_is_read_past_its_layer(tmp_path: Path) -> None:
    """Without stubs: the attention reads the weight. On CPU it is corrected, except where A is cut."""
    [config] = [f.config for f in FAMILIES if f.name.startswith("DeepSeek-V3,")]
    save_config(tmp_path, config)
    import_classes(config)
    rows = config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["v_head_dim"])
    pair = torch.zeros(8, config["kv_lora_rank"]), torch.zeros(rows, 8)
    save_adapter(tmp_path, {"model.layers.0.self_attn.kv_b_proj": pair})
    report = check_adapter(str(tmp_path), str(tmp_path), TWO_RANKS)
    assert report.plugin.outcome is Outcome.EXACT, report.plugin.reason
    assert report.stock.outcome in (Outcome.WRONG, Outcome.IGNORED)
    sharded = ServerOptions(tensor_parallel_size=2, fully_sharded_loras=True)
    report = check_adapter(str(tmp_path), str(tmp_path), sharded)
    assert report.plugin.outcome is Outcome.REFUSED
    assert "uses the layer's weight past its LoRA" in report.plugin.reason
    assert "--fully-sharded-loras" in report.plugin.reason
    assert report.stock.outcome in (Outcome.WRONG, Outcome.IGNORED)


def test_check_knows_a_layer_that_gets_a_part_of_a_batch(tmp_path: Path) -> None:
    [family] = [family for family in FAMILIES if family.name == "Mamba, Falcon-Mamba"]
    if not is_in_installed_vllm(family):
        pytest.skip("this vLLM has no such class")
    save_config(tmp_path, family.config)
    import_classes(family.config)
    pair = torch.zeros(8, 128), torch.zeros(8 + 2 * 16, 8)
    save_adapter(tmp_path, {"backbone.layers.0.mixer.x_proj": pair})
    report = check_adapter(str(tmp_path), str(tmp_path))
    assert report.plugin.outcome is Outcome.EXACT, report.plugin.reason
    [row] = report.rows
    assert row.stock.outcome is not Outcome.EXACT
