"""Tests with one engine per release without the plugin: its defects are those that ``defects`` lists.

They fail if a release no longer has a defect that is listed for it, or has a defect that is not listed.
"""

from __future__ import annotations

from pathlib import Path

from support.adapters import ServedModel, prompts
from support.offline import complete_with_adapters
from support.release import find_stock_messages


def test_stock_vllm_has_exactly_the_listed_defects(served: ServedModel, tmp_path: Path) -> None:
    refused = [name for name in served.adapters if find_stock_messages(name)]
    loaded = [name for name in served.adapters if name not in refused]
    # Load only one refused adapter, and load it last: after a refusal, stock vLLM's ranks return the
    # leftover results of that refusal.
    requested = {name: served.adapters[name] for name in (*loaded, refused[0])}
    log = tmp_path / "log"
    answers = complete_with_adapters(served.folder, requested, prompts()[0], log, plugin=False)
    messages = find_stock_messages(refused[0]) or ()
    assert any(message in str(answers[refused[0]]) for message in messages)
    for name in loaded:
        answer = answers[name]
        assert not isinstance(answer, str), (name, answer)
        comparison = served.reference.compare(name, answer)
        is_wrong = find_stock_messages(name) == ()
        assert comparison.is_exact != is_wrong, (name, comparison)
        assert not is_wrong or comparison.error > comparison.effect / 2, (name, comparison)
    assert "] vllm-nway-lora " not in log.read_text()
