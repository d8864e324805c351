"""Tests of kernels that read a layer's weight and bypass its LoRA.

The plugin turns such a kernel off if the model can run without it; otherwise it refuses adapters on the
layer.
"""

from __future__ import annotations

import pytest
from support.families import FAMILIES
from support.families.family import Family
from support.models import RankModel
from support.verdicts import is_in_installed_vllm, stub_dependencies

import vllm_nway_lora


def find_families(name: str) -> list[Family]:
    """Return the families of the installed vLLM whose name contains ``name``."""
    return [family for family in FAMILIES if name in family.name and is_in_installed_vllm(family)]


@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "plugin"])
@pytest.mark.parametrize("family", find_families("Qwen4-Exp"), ids=lambda family: family.name)
def test_plugin_turns_off_kernel_that_bypasses_lora(family: Family, plugin: bool) -> None:
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
