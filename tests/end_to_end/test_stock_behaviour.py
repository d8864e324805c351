"""Stock vLLM's good behaviour survives: the same scenarios, without the plugin and with it.

The model is a Llama: all of its layers are vLLM's own, so answers are equal token by token.
"""

from __future__ import annotations

import pytest
from support.adapters import ATTENTION, MLP, save_adapter
from support.behaviour import Record, run_scenarios
from support.checkpoints import save_llama

SCENARIOS = (
    "base model",
    "first use",
    "resident adapter",
    "touched folder",
    "a third adapter arrives",
    "two more adapters arrive",
    "folder of a running adapter is deleted",
    "adapter from memory",
    "another arrives beside an adapter from memory",
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Record]]:
    root = tmp_path_factory.mktemp("behaviour")
    checkpoint = save_llama(root / "model")
    adapters = {
        name: save_adapter(checkpoint, root / name, ATTENTION + MLP, seed)
        for seed, name in enumerate("abcd")
    }
    return {
        plugin: run_scenarios(checkpoint, adapters, root / f"log-{plugin}", plugin=plugin)
        for plugin in (False, True)
    }


def test_every_scenario_runs(records: dict[bool, dict[str, Record]]) -> None:
    assert list(records[False]) == list(records[True]) == list(SCENARIOS)
    # Adapters have an effect, so that equal tokens say something.
    answers = records[False]["two more adapters arrive"].tokens
    assert len({tuple(tokens[:4]) for tokens in answers.values()}) == 4, answers


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_answers_equal_stocks_and_no_file_is_read_more_often(
    records: dict[bool, dict[str, Record]], scenario: str
) -> None:
    stock, plugin = (records[side][scenario] for side in (False, True))
    assert "error" not in stock.tokens, stock
    assert plugin.tokens == stock.tokens
    # Stock vLLM can evict an adapter that the same step uses, and read it again.
    assert plugin.reads <= stock.reads
    # An adapter that must be loaded is looked at once before its step, which costs one call of the
    # workers and one listing of its folder, and keeps a bad adapter from ending the engine.
    assert plugin.calls - stock.calls <= max(
        stock.reads, scenario.startswith("adapter from memory")
    )
    assert plugin.listings - stock.listings <= stock.reads


@pytest.mark.parametrize("scenario", ["resident adapter", "touched folder"])
def test_resident_adapter_costs_no_call_and_no_listing(
    records: dict[bool, dict[str, Record]], scenario: str
) -> None:
    record = records[True][scenario]
    assert (record.calls, record.listings, record.reads) == (0, 0, 0)
