"""The same engine without the plugin: what the release gets wrong is what ``releases`` says.

Fails when a release that is said to have a defect has it no more, and when one has it unsaid.
"""

from __future__ import annotations

from pathlib import Path

from support.adapters import Served, prompts
from support.offline import serve
from support.release import stock_messages


def test_stock_vllm(served: Served, tmp_path: Path) -> None:
    refused = [name for name in served.adapters if stock_messages(name)]
    good = [name for name in served.adapters if name not in refused]
    # One refused adapter, and last: after it, ranks of stock vLLM answer with what is left of it.
    asked = {name: served.adapters[name] for name in (*good, refused[0])}
    log = tmp_path / "log"
    answers = serve(served.folder, asked, prompts()[0], log, plugin=False)
    assert any(words in str(answers[refused[0]]) for words in stock_messages(refused[0]) or ())
    for name in good:
        answer = answers[name]
        assert not isinstance(answer, str), (name, answer)
        comparison = served.reference.compare(name, answer)
        wrong = stock_messages(name) == ()
        assert comparison.exact != wrong, (name, comparison)
        assert not wrong or comparison.error > comparison.effect / 2, (name, comparison)
    assert "] vllm-nway-lora " not in log.read_text()
