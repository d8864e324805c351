"""One engine per release, tensor-parallel and fully sharded: every adapter equals PEFT.

The model is Qwen3.5 where the release serves its text model, else the one of ``support.fused_llama``.
"""

from __future__ import annotations

from pathlib import Path

from support.adapters import Served, prompts
from support.offline import serve


def test_every_adapter_equals_peft(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "log"
    answers = serve(served.folder, served.adapters, prompts()[0], log, plugin=True)
    for name in served.adapters:
        answer = answers[name]
        assert not isinstance(answer, str), (name, answer)
        comparison = served.reference.compare(name, answer)
        assert comparison.exact, (name, comparison)
    base = answers[""]
    assert not isinstance(base, str)
    assert served.reference.compare(None, base).error < 0.2
    assert "is on for vLLM" in log.read_text()
