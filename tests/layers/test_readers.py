"""Who holds a layer past its LoRA layer: found, and put right or refused."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_nway_lora.layers.aliases import create_lora_modules
from vllm_nway_lora.layers.readers import Reader, find_readers, find_refusals
from vllm_nway_lora.rows.notes import set_notes


class Holder:
    """An object of no module, such as an attention's implementation."""

    def __init__(self, held: Any) -> None:
        self.held = held


@dataclass(slots=True)
class Slotted:
    held: Any
    unset: Any = None


class Hostile:
    """An object whose every attribute and class raise when they are read."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileList(list[Any]):
    """A list that raises when it is read."""

    def __iter__(self) -> Any:
        raise RuntimeError


class Calls(nn.Module):
    """A module that only calls its child."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Any) -> Any:
        return self.gate(x)


class Reads(Calls):
    """A module that multiplies by its child's weight."""

    def forward(self, x: Any) -> Any:
        return x @ self.gate.weight.T


class MLAAttention(Calls):
    """A module with the name of vLLM's class, which cuts its child's weight into others."""

    def process_weights_after_loading(self) -> None:
        self.part = self.gate.weight[:1]


class CallingMLAAttention(MLAAttention):
    """As DeepSeek-V3.2's attention: it has other layers too, and calls them."""

    def __init__(self, gate: nn.Module, o_proj: nn.Module) -> None:
        super().__init__(gate)
        self.o_proj = o_proj

    def forward(self, x: Any) -> Any:
        return self.o_proj(x)


def build(**parts: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """Return a model with one LoRA layer, ``proj``, and that layer.

    Args:
        parts: further attribute of the model -> its value for the base layer.
    """
    model: Any = nn.Module()
    layer: Any = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
    nn.Module.__init__(layer)
    layer.base_layer = nn.Linear(2, 2)
    model.proj = layer
    for name, part in parts.items():
        setattr(model, name, part(layer.base_layer))
    return model, layer


def create(model: Any, layer: Any, modules: tuple[str, ...] = ()) -> Any:
    """Create the LoRA layers of a model from :func:`build`; return their manager."""
    packed = {"proj": list(modules)} if modules else {}
    manager = types.SimpleNamespace(model=model, modules={"proj": layer}, packed_modules=packed)
    create_lora_modules(lambda: None, manager, (), {})
    return manager


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "object": Holder,
    "dataclass with slots": Slotted,
    "object in an object": lambda base: Holder(Holder(base)),
    "list": lambda base: [base],
    "tuple in a dict": lambda base: {"x": (base,)},
    "partial": lambda base: functools.partial(print, x=base),
    "bound method": lambda base: base.forward,
    "closure": lambda base: lambda: base,
    "weak reference": weakref.ref,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_holder_is_found_and_adapters_are_refused(holder: str) -> None:
    model, layer = build(kept=HOLDERS[holder])
    [reader] = find_readers(model)
    assert reader.layer is layer.base_layer
    assert not reader.is_child
    create(model, layer)
    [(module, reason)] = find_refusals(layer).items()
    assert module == "proj"
    assert type(reader.holder).__qualname__ in reason


def test_every_module_of_a_packed_layer_is_refused() -> None:
    model, layer = build(kept=Holder)
    create(model, layer, ("a.q_proj", "a.k_proj"))
    assert list(find_refusals(layer)) == ["q_proj", "k_proj"]


def test_an_earlier_reason_stays() -> None:
    model, layer = build(kept=Holder)
    set_notes(layer.base_layer, refusals={"proj": "earlier"})
    create(model, layer)
    assert find_refusals(layer) == {"proj": "earlier"}


@pytest.mark.parametrize("is_registered", [True, False])
def test_second_parent_that_only_calls_gets_the_lora_layer(is_registered: bool) -> None:
    model, layer = build(shared=lambda base: Calls(base) if is_registered else [Calls(base)])
    shared = model.shared if is_registered else model.shared[0]
    assert find_readers(model) == [Reader(shared, "gate", layer.base_layer, is_child=True)]
    create(model, layer)
    assert shared.gate is layer
    assert not find_readers(model)
    assert not find_refusals(layer)


def test_second_parent_that_reads_the_weight_is_a_reason_to_refuse() -> None:
    model, layer = build(shared=Reads)
    create(model, layer)
    assert model.shared.gate is layer.base_layer
    assert "Reads" in find_refusals(layer)["proj"]


def test_parent_that_reads_the_weight_on_other_platforms_only_gets_the_lora_layer() -> None:
    """``MoERunner`` calls the router; on ROCm it multiplies by a copy of the weight (``tables.READS``)."""
    model, layer = build(runner=type("MoERunner", (Reads,), {}))
    create(model, layer)
    assert model.runner.gate is layer
    assert not find_refusals(layer)


def test_layer_whose_weight_attention_absorbs_is_refused() -> None:
    """Its sparse implementations keep no reference to the layer until 0.24.0."""
    model, layer = build()
    model.attention = MLAAttention(layer)
    create(model, layer)
    assert "MLAAttention" in find_refusals(layer)["proj"]


def test_layer_that_such_an_attention_calls_is_served() -> None:
    model, layer = build()
    model.attention = CallingMLAAttention(nn.Linear(2, 2), layer)
    create(model, layer)
    assert not find_refusals(layer)


def test_what_lies_below_the_lora_layer_is_no_reader() -> None:
    model, layer = build()
    layer.base_layer.method = Holder(layer.base_layer)
    layer.kept = layer.base_layer
    assert not find_readers(model)


def test_search_survives_any_object() -> None:
    model, _ = build(kept=Holder)
    model.hostile = [Hostile(), HostileList([1])]
    model.cycle = Holder(None)
    model.cycle.held = [model.cycle, model]
    model.unset = Slotted.__new__(Slotted)
    model.number, model.text, model.kind = 1, "x", Holder
    assert [reader.attribute for reader in find_readers(model)] == ["held"]


def test_skipped_objects_are_not_searched() -> None:
    model, _ = build(kept=Holder)
    assert not find_readers(model, [model.kept])


def test_models_without_lora_layers_have_no_readers() -> None:
    assert not find_readers(nn.Sequential(nn.Linear(2, 2)))
    assert not find_refusals(nn.Linear(2, 2))
