"""Tests with one engine per release, tensor-parallel and fully sharded: every adapter equals PEFT.

The model is Qwen3.5 if the release serves its text model, otherwise ``support.fused_llama``.
"""

from __future__ import annotations

from pathlib import Path

from support.adapters import ServedModel, prompts
from support.offline import complete_with_adapters


def test_every_adapter_equals_peft(served: ServedModel, tmp_path: Path) -> None:
    log = tmp_path / "log"
    answers = complete_with_adapters(served.folder, served.adapters, prompts()[0], log, plugin=True)
    for name in served.adapters:
        answer = answers[name]
        assert not isinstance(answer, str), (name, answer)
        comparison = served.reference.compare(name, answer)
        assert comparison.is_exact, (name, comparison)
    base = answers[""]
    assert not isinstance(base, str)
    assert served.reference.compare(None, base).error < 0.2
    assert "is on for vLLM" in log.read_text()
