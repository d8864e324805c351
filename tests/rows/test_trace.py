"""Tracing through ``load_weights`` of model classes that do what vLLM's model classes do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.twin import COLUMNS, ROWS, Twin, Weights, rows, trace
from torch import nn

from vllm_nway_lora.rows.held import gather
from vllm_nway_lora.rows.recorder import TraceError
from vllm_nway_lora.rows.trace import trace_modules


def test_rows_and_columns_are_those_of_the_rank() -> None:
    twin = Twin()
    found = trace(twin, "q", "k", "down", "copied")
    assert found["q"].paths == found["k"].paths == ("fused",)
    assert rows(found["q"]) == [[4, 5, 6, 7, -1, -1, -1, -1]]
    assert rows(found["k"]) == [[-1, -1, -1, -1, 4, 5, 6, 7]]
    assert found["q"].places[0].columns.tolist() == [0, 1, 2, 3]
    assert rows(found["down"]) == [list(range(8))]
    assert found["down"].places[0].columns.tolist() == [2, 3]
    assert rows(found["copied"]) == [list(range(8))]  # it has no loader of its own
    assert not any(traced.fault for traced in found.values())
    # Everything is as it was, and no memory has been taken.
    assert twin.fused.weight_loader == twin.load_half_of_rows
    assert not hasattr(twin.copied, "weight_loader")
    assert all(parameter.is_meta for parameter in twin.parameters())


def test_module_that_the_model_does_not_have_has_no_place() -> None:
    found = trace(Twin(), "q", "unknown", "k", "skipped")
    assert found["unknown"].fault == "ValueError: there is no module named unknown"
    assert (found["skipped"].places, found["skipped"].fault) == ((), "")
    assert found["q"].places
    assert found["k"].places


def test_model_that_reorders_rows_is_followed() -> None:
    class Reordering(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight.view(4, 2, COLUMNS).transpose(0, 1).reshape(ROWS, COLUMNS))

    traced = trace(Reordering(), "q")["q"]
    assert rows(traced) == [[1, 3, 5, 7, -1, -1, -1, -1]]
    assert [place.received for place in traced.places] == [ROWS]


def test_rows_that_a_model_repeats_show_in_what_the_loader_receives() -> None:
    """K2-Horizon repeats the key heads if there are fewer of them than ranks."""

    class Repeating(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight.repeat_interleave(2, 0))

    assert trace(Repeating(), "q")["q"].places[0].received == 2 * ROWS


def test_model_that_loads_a_weight_twice_is_followed() -> None:
    class Repeating(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            for shard in ("q", "k"):
                super().load(shard, weight)

    traced = trace(Repeating(), "k")["k"]
    assert gather(traced, "fused", ROWS).rows.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    assert traced.shards == (["q"], ["k"])


def test_weights_that_are_held_back_are_found_by_their_numbers() -> None:
    """DeepSeek-V4 waits for both halves of a pair; Step5 for all weights of a layer."""

    class Waiting(Twin):
        def load_weights(self, weights: Weights) -> None:
            held = {}
            for name, weight in weights:
                held[name] = weight
                if len(held) == 2:
                    joined = torch.cat([*held.values()])
                    self.fused.weight_loader(self.fused, joined)
                    held.clear()

        @staticmethod
        def load_half_of_rows(parameter: Any, weight: torch.Tensor, shard: str = "") -> None:
            parameter.data.copy_(weight[4:12])

    found = trace(Waiting(), "q", "k")
    assert rows(found["q"]) == [[4, 5, 6, 7, -1, -1, -1, -1]]
    assert rows(found["k"]) == [[-1, -1, -1, -1, 0, 1, 2, 3]]


def test_layers_with_equal_loaders_are_numbered_once() -> None:
    numbered: list[str] = []

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Twin() for _ in range(3))

        def load_weights(self, weights: Weights) -> None:
            for name, weight in weights:
                if not weight.is_meta:
                    numbered.append(name)
                layer: Any = self.layers[int(name[7])]
                # The last layer differs: its weight goes to another place.
                layer.load("k" if name == "layers.2.q.weight" else name[9:-7], weight)

    found = trace(Layers(), "layers.0.q", "layers.1.q", "layers.2.q")
    assert set(numbered) == {"layers.0.q.weight", "layers.2.q.weight"}
    assert found["layers.1.q"].paths == ("layers.1.fused",)
    assert rows(found["layers.1.q"]) == rows(found["layers.0.q"])
    assert rows(found["layers.2.q"]) == [[-1, -1, -1, -1, 4, 5, 6, 7]]


def test_transposed_weight_is_no_copy_of_rows() -> None:
    class Transposing(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight.T.contiguous().T.T)

    found = trace_modules(Transposing(), {"copied": (COLUMNS, ROWS)})
    assert found["copied"].fault.startswith("TraceError: the model loads it transposed")


def test_loader_of_a_layer_is_recorded_too() -> None:
    """Muse Spark calls the layer's method and not the parameter's."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, COLUMNS, device="meta"), requires_grad=False)

        def weight_loader(self, parameter: Any, weight: torch.Tensor) -> None:
            parameter.data.copy_(weight[4:])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Layer()

        def load_weights(self, weights: Weights) -> Iterator[str]:
            for name, weight in weights:  # a generator, as in some classes
                self.proj.weight_loader(self.proj.weight, weight)
                yield name

    model = Model()
    assert rows(trace(model, "proj")["proj"]) == [[4, 5, 6, 7]]
    assert "weight_loader" not in vars(model.proj)


def test_model_that_lists_all_weights_is_numbered_once_per_kind_of_layer() -> None:
    """Llama 4 permutes every weight before it loads one: all layers' weights would be in memory."""
    numbered: list[str] = []

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Twin() for _ in range(4))

        def load_weights(self, weights: Weights) -> None:
            for name, weight in list(weights):
                if not weight.is_meta:
                    numbered.append(name)
                layer: Any = self.layers[int(name[7])]
                layer.load(name[9:-7], weight)
                if name == "layers.3.q.weight":  # this layer's q is loaded for its k too
                    layer.load("k", weight)

    names = [f"layers.{n}.{module}" for n in range(4) for module in ("q", "down")]
    found = trace(Layers(), *names)
    assert "layers.1.q.weight" not in numbered
    assert found["layers.2.q"].paths == ("layers.2.fused",)
    assert rows(found["layers.2.q"]) == [[4, 5, 6, 7, -1, -1, -1, -1]]
    assert len(found["layers.3.q"].places) == 2
    assert found["layers.3.down"].paths == ("layers.3.down",)


def test_modules_whose_names_differ_by_a_number_are_not_equal() -> None:
    """LFM2's ``w1`` and ``w3`` are the two outputs of one layer."""

    class Numbered(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            number = int(name[1])
            self.fused.weight_loader(self.fused, weight, number)

        @staticmethod
        def load_half_of_rows(parameter: Any, weight: torch.Tensor, shard: int) -> None:
            Twin.load_half_of_rows(parameter, weight, "k" if shard == 3 else "q")

    found = trace(Numbered(), "w1", "w3")
    assert rows(found["w1"]) == [[4, 5, 6, 7, -1, -1, -1, -1]]
    assert rows(found["w3"]) == [[-1, -1, -1, -1, 4, 5, 6, 7]]


def test_bias_that_a_model_adds_is_no_place() -> None:
    class WithBias(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight)
            self.down.weight_loader(self.down, torch.zeros(ROWS))

    assert trace(WithBias(), "q")["q"].paths == ("fused",)


def test_module_that_lands_in_two_layers_has_no_single_place() -> None:
    class Sharing(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load("copied", weight)
            super().load("down", weight)

    traced = trace(Sharing(), "copied")["copied"]
    with pytest.raises(TraceError, match="its weight is loaded into down too"):
        gather(traced, "copied", ROWS)


def test_rows_that_are_loaded_twice_have_no_single_place() -> None:
    class Overwriting(Twin):
        def load(self, name: str, weight: torch.Tensor) -> None:
            super().load(name, weight)
            super().load(name, weight)

    traced = trace(Overwriting(), "q")["q"]
    with pytest.raises(TraceError, match="the same rows twice"):
        gather(traced, "fused", ROWS)


def test_model_that_fails_on_everything_is_given_up() -> None:
    calls = []

    class Failing(Twin):
        def load_weights(self, weights: Weights) -> None:
            calls.append(next(weights))
            raise KeyError("scale")

    found = trace(Failing(), *(f"m{n}" for n in range(300)))
    assert all(traced.fault for traced in found.values())
    assert len(calls) < 700  # 101 failures before it is given up, in each of the loads
