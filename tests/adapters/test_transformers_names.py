"""Tests of names that transformers 5 gives to modules, where the checkpoint's differ."""

from __future__ import annotations

import re

import pytest
from support.families import FAMILIES
from support.families.family import EXACT, Family
from support.models import RankModel
from support.verdicts import is_in_installed_vllm, stub_dependencies

import vllm_nway_lora
from vllm_nway_lora.adapters.names import Names
from vllm_nway_lora.adapters.served import read_target
from vllm_nway_lora.models.transformers_names import Conversion

#: Family -> the differences between a checkpoint's names and those of transformers 5.19.
RENAMED = {
    "DeepSeek-V4": {
        r"\.attn\.": ".self_attn.",
        r"\.wq_a$": ".q_a_proj",
        r"\.wkv$": ".kv_proj",
        r"\.wgate$": ".gate_proj",
        r"\.indexer\.compressor\.": ".compressor.indexer.",
    },
    "GLM-5-Next": {r"self_attn\.f_a_proj": "self_attn.forget_gate.f_a_proj"},
    "Inkling, multimodal": {
        r"model\.llm\.": "model.language_model.",
        r"\.attn\.wq_du": ".self_attn.q_proj",
        r"\.attn\.wk_dv": ".self_attn.k_proj",
        r"\.attn\.wv_dv": ".self_attn.v_proj",
        r"\.attn\.wr_du": ".self_attn.r_proj",
    },
}
AVAILABLE = [f for f in FAMILIES if f.name in RENAMED and is_in_installed_vllm(f)]


@pytest.mark.parametrize("family", AVAILABLE, ids=lambda family: family.name)
def test_modules_are_found_by_the_names_of_transformers(family: Family) -> None:
    vllm_nway_lora.register()
    with stub_dependencies(family):
        rank = RankModel(family.config, 0, 1)
        rank.wrap()
    if not Conversion(rank.model).renames:
        pytest.skip("the installed transformers has no names of its own for this model")
    names = Names(read_target(rank.worker_manager._adapter_manager))
    renamed = 0
    for fused in family.fused:
        for module in fused.modules if fused.plugin is EXACT else ():
            name = module
            for old, new in RENAMED[family.name].items():
                name = re.sub(old, new, name)
            if name != module:
                renamed += 1
                parent, own = fused.layer.rpartition(".")[0], module.rpartition(".")[2]
                assert names.resolve(name) == f"{parent}.{own}"
    assert renamed
