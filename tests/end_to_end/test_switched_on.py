"""Servers of a model whose class lacks vLLM's flags for LoRA: GPT-2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import checkpoints
from support.adapters import ServedModel, prompts, save_served_model
from support.server import Server, ServerError

ADAPTERS = {"attention": ("c_attn",), "all": ("c_attn", "c_proj", "c_fc")}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return save_served_model(tmp_path_factory.mktemp("gpt2"), checkpoints.save_gpt2, ADAPTERS)


@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
def test_adapters_equal_peft(gpt2: ServedModel, tmp_path: Path, size: int) -> None:
    with Server(gpt2.folder, tmp_path / "log", plugin=True, tensor_parallel_size=size) as server:
        for name, folder in gpt2.adapters.items():
            server.load(name, folder)
            for prompt in prompts():
                comparison = gpt2.reference.compare(name, server.complete(name, prompt))
                assert comparison.is_exact, (name, comparison)


def test_without_the_plugin_vllm_refuses(gpt2: ServedModel, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ServerError), Server(gpt2.folder, log, plugin=False):
        pass
    refusal = "GPT2LMHeadModel does not support LoRA yet|LoRA is not supported for GPT2LMHeadModel"
    assert re.search(refusal, log.read_text())
