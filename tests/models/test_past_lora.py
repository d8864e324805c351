"""Tests of kernels that read a layer's weight and bypass its LoRA.

The plugin turns such a kernel off if the model can run without it; otherwise it refuses adapters on the
layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.families.family import Family
from support.families.mla import MLA_STUBS
from support.models import RankModel
from support.verdicts import is_in_installed_vllm, stub_dependencies
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention.mla_attention import MLAAttention

import vllm_nway_lora
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.layers import mixers
from vllm_nway_lora.layers.mla_calls import CorrectedProjection
from vllm_nway_lora.layers.readers import find_refusals
from vllm_nway_lora.models import prepare, tables
from vllm_nway_lora.rows.notes import get_notes


def find_families(name: str) -> list[Family]:
    """Return the families of the installed vLLM whose name contains ``name``."""
    return [family for family in FAMILIES if name in family.name and is_in_installed_vllm(family)]


@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "plugin"])
@pytest.mark.parametrize("family", find_families("Qwen4-Exp"), ids=lambda family: family.name)
def test_plugin_turns_off_kernel_that_bypasses_lora(family: Family, plugin: bool) -> None:
    offline.initialize()  # loads vLLM's plugins, once
    (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1)
        mixers = [m for m in rank.model.modules() if hasattr(m, "_use_hc_down_silu")]
        for mixer in mixers:
            mixer._use_hc_down_silu = True  # as on GPUs with compute capability 9.0 or higher
        rank.wrap()
    assert mixers
    assert {mixer._use_hc_down_silu for mixer in mixers} == {not plugin}


@pytest.mark.parametrize(
    "family",
    [
        family
        for name in ("AliceAI", "GLM-5-Next", "Qwen3.5, Qwen3.6")
        for family in find_families(name)
    ],
    ids=lambda family: family.name,
)
def test_plan_refuses_adapters_on_convolutions(family: Family) -> None:
    vllm_nway_lora.register()
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1)
        rank.wrap()
        rank.warm_up()
    layers = {n: m for n, m in rank.model.named_modules() if n.endswith("conv1d")}
    assert layers
    for name, layer in layers.items():
        assert list(layer.plan.refusals) == [name.rpartition(".")[2]]


def build(family: Family, sharded: bool = False) -> RankModel:
    """Return one rank of a family's model with LoRA, the plugin on; ``sharded``: of two, fully sharded."""
    vllm_nway_lora.register()
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1 + sharded, sharded)
        rank.wrap()
        rank.warm_up()
    return rank


@pytest.mark.parametrize(
    "family", find_families("DeepSeek-V3, Kimi-K2"), ids=lambda family: family.name
)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_projection_that_attention_reads_is_corrected_or_refused(
    family: Family, sharded: bool
) -> None:
    stubs = tuple(stub for stub in family.stubs if stub not in MLA_STUBS)
    try:
        rank = build(dataclasses.replace(family, stubs=stubs), sharded)
    except NotImplementedError as error:  # until 0.29.0
        pytest.skip(f"on CPU: {error}")
    layers: dict[str, Any] = rank.worker_manager._adapter_manager.modules
    refusals = [found for layer in layers.values() if (found := find_refusals(layer))]
    attention = [m for m in rank.model.modules() if isinstance(m, MLAAttention)]
    assert attention
    for layer in attention:
        is_corrected = isinstance(layer.impl.kv_b_proj, CorrectedProjection)
        assert is_corrected is not sharded
    if sharded:
        [reason] = {refusal["kv_b_proj"] for refusal in refusals}
        assert "CPUMLAImpl" in reason
        assert "--fully-sharded-loras has cut its LoRA-A" in reason
    else:
        assert not refusals


@pytest.mark.parametrize(
    "family", find_families("Intern-S2-Mobius"), ids=lambda family: family.name
)
def test_gate_of_shared_expert_uses_its_lora_layer(family: Family) -> None:
    """The block calls it by another name than the adapter's."""
    rank = build(family)
    blocks = [m for m in rank.model.modules() if hasattr(m, "shared_expert_gate")]
    assert blocks
    for block in blocks:
        gate = block.shared_expert_gate
        assert isinstance(gate, BaseLinearLayerWithLoRA)
        assert not find_refusals(gate)
        assert block.shared_expert.expert_gate is gate
        a, b = torch.ones(1, gate.input_size), torch.full((1, 1), 2.0)
        gate.set_lora(0, a, b)
        rank.worker_manager._adapter_manager.lora_index_to_id[0] = 1
        rank.select_adapter(1, 1)
        # The base layer's weight is zero.
        output, _ = rank.run_as_rank(lambda: block.shared_expert.expert_gate(a))  # noqa: B023
        assert output.item() == 2.0 * gate.input_size


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        (family, layer)
        for name, layer in (
            ("DeepSeek-V4", "wo_a"),
            ("AliceAI", "res_proj"),
            ("LFM2", "short_conv.conv"),
        )
        for family in find_families(name)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_layer_whose_weight_is_read_directly_is_refused(family: Family, layer: str) -> None:
    rank = build(family)
    refused = {
        name: find_refusals(found) or get_notes(found).refusals
        for name, found in rank.model.named_modules()
        if name.endswith(layer)
    }
    assert refused
    for name, refusals in refused.items():
        assert list(refusals) == [name.rpartition(".")[2]]


@pytest.mark.parametrize("read", tables.READS, ids=lambda read: f"{read.parent}.{read.layer}")
def test_read_is_refused_only_where_it_happens(
    read: tables.Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent: Any = type(read.parent, (torch.nn.Module,), {})()
    inner = parent
    *path, name = read.layer.split(".")
    for part in path:
        setattr(inner, part, torch.nn.Module())
        inner = getattr(inner, part)
    layer = torch.nn.Linear(1, 1)
    setattr(inner, name, layer)
    model = torch.nn.Sequential(parent)
    if read.flag:
        setattr(parent, read.flag, None)
        prepare.mark_unsupported_modules(model)
        assert not get_notes(layer).refusals
        setattr(parent, read.flag, True)
    if read.platform:
        prepare.mark_unsupported_modules(model)
        assert not get_notes(layer).refusals
        platform = prepare.platforms.current_platform
        monkeypatch.setattr(type(platform), read.platform, lambda self: True)
    prepare.mark_unsupported_modules(model)
    assert list(get_notes(layer).refusals) == [name]


@pytest.mark.parametrize("owner", tables.FUSED_KERNEL_FLAGS)
def test_flag_is_turned_off(owner: str) -> None:
    flag, value = tables.FUSED_KERNEL_FLAGS[owner]
    module: Any = type(owner, (torch.nn.Module,), {})()
    prepare.disable_fused_kernels(module)
    assert not hasattr(module, flag)
    setattr(module, flag, True)
    prepare.disable_fused_kernels(module)
    assert getattr(module, flag) is value


@pytest.mark.parametrize("known", [False, True], ids=["changed", "known"])
@pytest.mark.parametrize("name", ["Mamba, Falcon-Mamba", "Jamba", "PLaMo 2"])
def test_layers_that_get_a_part_of_a_batch_are_served_if_their_mixer_is_known(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [family] = [family for family in FAMILIES if family.name == name]
    if not is_in_installed_vllm(family):
        pytest.skip(f"this release of vLLM has no {name}")
    if not known:
        monkeypatch.setattr(mixers, "_COUNTS", ("a_count_that_no_release_has",))
    layers, refused = set(), set()
    for path, layer in build(family).model.named_modules():
        module = path.rpartition(".")[2]
        if module in ("x_proj", "bcdt_proj", "dt_proj"):
            assert isinstance(layer, BaseLinearLayerWithLoRA)
            layers.add(module)
            if reason := find_refusals(layer).get(module):
                assert "with the prefilled and with the decoded tokens of a batch apart" in reason
                assert "its forward_impl is not known" in reason
                refused.add(module)
    assert len(layers) == 2
    assert refused == (set() if known else layers)
