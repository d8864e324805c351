"""Model classes that change a weight's values while they load it: the trace says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.twin import ROWS, Twin, Weights, rows, trace


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight * 2,
        lambda weight: (weight + weight.roll(2, 0)) / 2,
        lambda weight: -weight.flip(0) + 2**24,
    ],
    ids=["multiple", "mean", "difference"],
)
def test_model_that_changes_values_is_no_copy(change: Callable[..., torch.Tensor]) -> None:
    class Changing(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, change(weight))

    found = trace(Changing(), "q", "down")
    assert found["q"].places == ()
    assert found["q"].fault == "ChangedError: the model changes its values while it loads them"
    assert found["q"].is_changed


def test_weight_that_the_model_changes_does_not_hide_the_others() -> None:
    class Scaling(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight * 3 if name == "q" else weight)

    found = trace(Scaling(), "q", "k")
    assert (found["q"].is_changed, found["k"].is_changed) == (True, False)
    assert rows(found["k"]) == [[-1, -1, -1, -1, 4, 5, 6, 7]]


def test_changed_weight_is_found_in_a_model_that_lists_all_weights_first() -> None:
    """Llama 4 does up to 0.20.2: every weight arrives under the name of the last one."""

    class Listing(Twin):
        def load_weights(self, weights: Weights) -> None:
            super().load_weights(iter(list(weights)))

        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight * 3 if name == "q" else weight)

    found = trace(Listing(), "q", "skipped", "k", "down")
    assert [name for name, traced in found.items() if traced.is_changed] == ["q"]
    assert rows(found["k"]) == [[-1, -1, -1, -1, 4, 5, 6, 7]]
    assert rows(found["down"]) == [list(range(8))]
    assert not found["skipped"].places


def test_model_that_loads_in_a_narrow_type_is_not_one_that_changes_values() -> None:
    class Narrow(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight.bfloat16().float())

    [traced] = trace(Narrow(), "q").values()
    assert traced.fault == "TraceError: the model loads it in a type too narrow for the numbers"
    assert not traced.is_changed


def test_numbers_of_many_modules_are_loaded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_nway_lora.rows.codes.MAX_NUMBERS", 2 * ROWS)
    found = trace(Twin(), "q", "k", "down", "copied")
    assert [traced.fault for traced in found.values()] == [""] * 4
    assert rows(found["copied"]) == [list(range(8))]
