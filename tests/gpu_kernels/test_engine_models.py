"""What ``ci/gpu_engines.py`` does without a GPU: save a model, its adapters and the expected logprobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import gpu_engine_models
from support.adapters import Reference
from support.gpu_engine import BASE, NEW_TOKENS

MODEL = gpu_engine_models.MLA


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    gpu_engine_models.save(root, [MODEL])
    return root


def complete(reference: Reference, adapter: str | None, prompt: list[int]) -> dict[str, Any]:
    """Return the reference's own answer, as an engine gives it."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(reference.logprobs(adapter, tokens)[-1].argmax()))
    found = reference.logprobs(adapter, tokens)[:-1]
    logprobs = found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    return {"tokens": tokens, "logprobs": logprobs, "prompt_length": len(prompt)}


def test_expected_logprobs_are_those_of_each_adapter(root: Path) -> None:
    expected = json.loads((root / MODEL / "expected.json").read_text())
    config = json.loads((root / MODEL / "model" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert set(expected["adapters"]) == {"kv_b_proj", "attention", "all"}
    for name, found in expected["adapters"].items():
        saved = json.loads((root / MODEL / found["folder"] / "adapter_config.json").read_text())
        assert "kv_b_proj" in saved["target_modules"]
        effect = torch.tensor(found["logprobs"][0]) - torch.tensor(expected["base"][0])
        assert effect.abs().max() > 1, name


def test_only_an_answer_with_the_adapter_is_exact(root: Path, tmp_path: Path) -> None:
    saved = json.loads((root / MODEL / "expected.json").read_text())
    prompt = saved["prompts"][0]
    folders = {name: root / MODEL / found["folder"] for name, found in saved["adapters"].items()}
    reference = Reference(root / MODEL / "model", folders)
    right, base = (complete(reference, name, prompt) for name in ("kv_b_proj", None))
    run = {
        **{"model": MODEL, "mode": "eager", "plugin": True, "card": "none", "vllm": "0"},
        "adapters": {
            BASE: {"outcome": "exact", "answers": [base]},
            "kv_b_proj": {"outcome": "exact", "answers": [right]},
            "attention": {"outcome": "wrong", "answers": [base]},
            "all": {"outcome": "refused", "refusal": "AdapterError: no"},
        },
        "together": [["kv_b_proj", right], ["attention", right]],
    }
    results = tmp_path / "runs.json"
    results.write_text(json.dumps([run]))
    rows = gpu_engine_models.compare(root, results)
    assert {(row["batch"], row["adapter"]): row["outcome"] for row in rows} == {
        ("alone", "all"): "refused",
        ("alone", BASE): "exact",
        ("alone", "kv_b_proj"): "exact",
        ("alone", "attention"): "ignored",
        ("together", "kv_b_proj"): "exact",
        ("together", "attention"): "wrong",
    }
