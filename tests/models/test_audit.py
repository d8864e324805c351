"""The words of the audit of the model registry, on families of which they are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mixtures
from support.audit import audit
from support.audit_words import audit_rank
from support.families import FAMILIES
from support.models import import_classes, save_config
from support.verdicts import stub_dependencies

import vllm_nway_lora
from vllm_nway_lora.layers import claims
from vllm_nway_lora.models import traced

LAYER = "model.layers.#"


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    vllm_nway_lora.unregister()
    vllm_nway_lora.register()
    yield
    vllm_nway_lora.unregister()


def words_of(name: str, folder: Path) -> dict[str, str]:
    [family] = [family for family in FAMILIES if family.name == name]
    save_config(folder, family.config)
    with stub_dependencies(family):
        import_classes(family.config)
        return audit_rank(str(folder), 1, 2)


def test_layers_are_exact_ours_or_refused(tmp_path: Path) -> None:
    words = words_of("Granite 4 hybrid, 8 groups", tmp_path)
    assert words[f"{LAYER}.self_attn.qkv_proj: k_proj"] == "exact"
    assert words[f"{LAYER}.self_attn.o_proj: o_proj"] == "exact"
    assert words[f"{LAYER}.mamba.in_proj: in_proj"] == "ours"
    assert words[f"{LAYER}.mamba.conv1d: conv1d"].startswith("refused: the convolution kernel")


def test_layers_without_a_trace_are_by_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no twin")

    monkeypatch.setattr(traced, "build_twin", fail)
    words = words_of("Llama 4", tmp_path)
    assert set(words.values()) == {"by table: RuntimeError: no twin"}


def test_slots_that_are_not_the_traces_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words_of("Llama 4", tmp_path)[f"{LAYER}.self_attn.qkv_proj: q_proj"] == "ours"
    # The plugin takes vLLM's layer for right; vLLM does not know of Llama 4's rotary permutation.
    monkeypatch.setattr(claims, "find_difference", lambda *_: "")
    words = words_of("Llama 4", tmp_path)
    assert words[f"{LAYER}.self_attn.qkv_proj: q_proj"] == "DIFFERS: its rows"
    assert words[f"{LAYER}.self_attn.qkv_proj: v_proj"] == "exact"


def test_columns_that_are_not_the_traces_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = traced.gather

    def gather(*args: Any) -> Any:
        held = number(*args)
        object.__setattr__(held, "columns", torch.flip(held.columns, (0,)))
        return held

    monkeypatch.setattr(traced, "gather", gather)
    monkeypatch.setattr(claims, "find_difference", lambda *_: "")
    words = words_of("Llama 4", tmp_path)
    assert words[f"{LAYER}.feed_forward.down_proj: down_proj"] == "DIFFERS: its columns"


def words_of_experts(folder: Path) -> dict[str, str]:
    name = "Qwen3MoeForCausalLM"
    config = {**mixtures.COMMON, **mixtures.CONFIGS[name], "architectures": [name]}
    save_config(folder, config)
    import_classes(config)
    words = audit_rank(str(folder), 1, 2)
    start = f"{LAYER}.mlp.experts: "
    return {key.removeprefix(start): word for key, word in words.items() if key.startswith(start)}


def test_experts_are_exact_by_table_or_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["down_proj", "gate_proj", "up_proj"]
    assert words_of_experts(tmp_path) == dict.fromkeys(kinds, "exact")
    monkeypatch.setattr("support.audit_words.find_difference", lambda *_: "its rows")
    assert words_of_experts(tmp_path) == dict.fromkeys(kinds, "DIFFERS: its rows")
    monkeypatch.setattr(traced, "trace_experts", lambda *_: [])
    assert words_of_experts(tmp_path) == {"experts": "by table"}


def test_a_class_that_cannot_be_built_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "support.audit.configurations",
        lambda _: [({"model_type": "llama", "architectures": ["NoSuchModel"]}, None, True)],
    )
    assert str(audit("NoSuchModel")).startswith("cannot be built here: ")


def test_the_command_counts_compares_and_fails_on_a_difference(tmp_path: Path) -> None:
    code = """
import audit
first = {"takes no LoRA": 1, "architectures": {"A": {"q: q": "exact"}, "B": "cannot be built here: x"}}
second = {"takes no LoRA": 1, "architectures": {
    "A": {"q: q": "TP 1: exact; TP 2: DIFFERS: its rows", "k: k": "by table and also ours"}}}
assert audit.count(first) == {"exact": 1, "cannot be built here": 1}
assert audit.count(second) == {"exact": 1, "DIFFERS": 1, "by table": 1, "ours": 1}
assert audit.compare(first, second) == [
    "B: present -> absent",
    "A k: k: absent -> by table and also ours",
    "A q: q: exact -> TP 1: exact; TP 2: DIFFERS: its rows",
]
audit.run = lambda release, only: {"0.1": first, "0.2": second}[release]
import sys
for release, status in (("0.1", 0), ("0.2", 1)):
    sys.argv = ["audit", release]
    assert audit.main() == status
"""
    ci = Path(__file__).parents[2] / "ci"
    env = {**os.environ, "PYTHONPATH": str(ci)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A q: q: TP 1: exact; TP 2: DIFFERS: its rows" in done.stdout
