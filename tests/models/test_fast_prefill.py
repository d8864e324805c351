"""With ``--kv-sharing-fast-prefill``, adapters on layers that get only some tokens are refused."""

from __future__ import annotations

import pytest
from support.families import FAMILIES
from support.models import RankModel
from support.verdicts import is_in_installed_vllm, stub_dependencies
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

import vllm_nway_lora
from vllm_nway_lora.rows.notes import get_notes

#: Names of two-layer models whose last layer shares its cache with the first one.
CONFIG = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 1,
    "layer_types": ["full_attention", "full_attention"],
    "attention_k_eq_v": False,
}


@pytest.mark.parametrize("is_on", [False, True], ids=["off", "on"])
def test_adapters_on_the_last_layers_are_refused(is_on: bool) -> None:
    [family] = [family for family in FAMILIES if family.name.startswith("Gemma 4, k_proj for K")]
    if not is_in_installed_vllm(family):
        pytest.skip("this release of vLLM has no Gemma 4")
    vllm_nway_lora.register()
    with stub_dependencies(family):
        rank = RankModel({**family.config, **CONFIG}, 0, 1)
        # As the option sets it; the constructor needs a device for its buffers.
        [text] = [part for part in rank.model.modules() if hasattr(part, "fast_prefill_enabled")]
        text.fast_prefill_enabled = is_on
        rank.wrap()
    reasons = {
        path: set(get_notes(layer.base_layer).refusals.values())
        for path, layer in rank.model.named_modules()
        if isinstance(layer, BaseLinearLayerWithLoRA) and ".layers." in path
    }
    first = [found for path, found in reasons.items() if ".layers.0." in path]
    last = [found for path, found in reasons.items() if ".layers.1." in path]
    assert len(first) >= 4
    assert len(last) >= 3
    assert not any(first)
    expected = {"with --kv-sharing-fast-prefill the layer gets only some tokens of a prefill"}
    assert all(found == (expected if is_on else set()) for found in last), reasons
