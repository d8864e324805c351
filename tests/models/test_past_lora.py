"""What a model computes past its LoRA layers: turned off where it can be, else marked for refusal."""

from __future__ import annotations

import pytest
from support.families import FAMILIES
from support.family import Family
from support.models import RankModel
from support.verdicts import runs_here, stubbed

import vllm_nway_lora


def here(name: str) -> list[Family]:
    return [family for family in FAMILIES if name in family.name and runs_here(family)]


@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "plugin"])
@pytest.mark.parametrize("family", here("Qwen4-Exp"), ids=lambda family: family.name)
def test_kernel_that_reads_the_weight(family: Family, plugin: bool) -> None:
    (vllm_nway_lora.register if plugin else vllm_nway_lora.unregister)()
    with stubbed(family):
        rank = RankModel(family.config, 0, 1)
        mixers = [m for m in rank.model.modules() if hasattr(m, "_use_hc_down_silu")]
        for mixer in mixers:
            mixer._use_hc_down_silu = True  # as on a GPU from compute capability 9.0 on
        rank.wrap()
    assert mixers
    assert {mixer._use_hc_down_silu for mixer in mixers} == {not plugin}


@pytest.mark.parametrize(
    "family",
    [family for name in ("AliceAI", "GLM-5-Next", "Qwen3.5, Qwen3.6") for family in here(name)],
    ids=lambda family: family.name,
)
def test_convolutions_take_no_lora(family: Family) -> None:
    vllm_nway_lora.register()
    with stubbed(family):
        rank = RankModel(family.config, 0, 1)
        rank.wrap()
        rank.warm_up()
    layers = {n: m for n, m in rank.model.named_modules() if n.endswith("conv1d")}
    assert layers
    for name, layer in layers.items():
        assert list(layer.plan.refusals) == [name.rpartition(".")[2]]
