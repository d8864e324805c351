"""The tables of known fusions, and the mapping that they complete."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from vllm_nway_lora.models.mapping import complete_mapping
from vllm_nway_lora.models.tables import OUTPUTS, outputs_by_module
from vllm_nway_lora.rows.notes import set_notes


@pytest.mark.parametrize(
    ("fused", "modules", "outputs", "expected"),
    [
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"], 4, ((0, 1, 2), (3,))),
        ("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"], 5, None),
        ("in_proj_qkvz", ["in_proj_qkvz"], 1, ((0,),)),
        ("in_proj_qkvz", ["q", "k", "v", "z"], 4, ((0,), (1,), (2,), (3,))),
        ("in_proj", ["in_proj"], 5, ((0, 1, 2, 3, 4),)),
        ("unknown", ["x", "y"], 3, None),
    ],
)
def test_outputs_by_module(
    fused: str, modules: list[str], outputs: int, expected: tuple[tuple[int, ...], ...] | None
) -> None:
    assert outputs_by_module(fused, modules, outputs) == expected


@pytest.mark.parametrize("fused", OUTPUTS)
def test_known_fusions_cover_their_outputs_in_order(fused: str) -> None:
    outputs = [output for group in OUTPUTS[fused].values() for output in group]
    assert outputs == list(range(len(outputs)))


def build_model(**outputs: int) -> nn.Module:
    """Return a model of merged layers with the given numbers of outputs; no layer has a weight."""
    model = nn.Module()
    for name, n_outputs in outputs.items():
        layer = MergedColumnParallelLinear.__new__(MergedColumnParallelLinear)
        nn.Module.__init__(layer)
        layer.output_sizes = [16] * n_outputs
        setattr(model, name, layer)
    return model


def add_child(model: nn.Module, name: str, mapping: dict[str, list[str]]) -> None:
    child: Any = nn.Module()
    child.packed_modules_mapping = mapping
    setattr(model, name, child)


#: Fused projection, its number of outputs, its declared modules, the completed modules (None: absent).
ENTRIES: dict[str, tuple[str, int, list[str] | None, list[str] | None]] = {
    "good": ("qkv_proj", 3, ["q_proj", "k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]),
    "unusable": ("conv1d", 3, ["q_conv1d", "k_conv1d", "v_conv1d"], None),
    "usable of that name": ("conv1d", 1, ["conv1d"], ["conv1d"]),
    "misnamed": ("gate_up_proj", 2, ["up_proj", "down_proj"], ["gate_proj", "up_proj"]),
    "workaround": (
        "in_proj_qkvz",
        4,
        ["in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"],
        ["in_proj_qkv", "in_proj_z"],
    ),
    "one module of that name": ("in_proj_qkvz", 4, ["in_proj_qkvz"], ["in_proj_qkvz"]),
    "padding that is not there": ("mix", 1, ["mix_proj", "_input_mix_padding"], ["mix_proj"]),
    "padding that is": (
        "mix",
        2,
        ["mix_proj", "_input_mix_padding"],
        ["mix_proj", "_input_mix_padding"],
    ),
    "unlisted": ("wk_weights_proj", 2, None, ["wk", "weights_proj"]),
    "unlisted, other outputs": ("wk_weights_proj", 3, None, None),
    "unlisted, one module": ("input_linear", 2, None, ["input_linear"]),
    "unknown": ("x_proj", 3, None, None),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_completed_entry(case: str) -> None:
    fused, n_outputs, declared, completed = ENTRIES[case]
    mapping = {fused: declared} if declared else {}
    result = complete_mapping(build_model(**{fused: n_outputs}), mapping)
    assert result == ({fused: completed} if completed else {})
    assert mapping == ({fused: declared} if declared else {})


def test_entry_hidden_by_an_outer_class_is_found() -> None:
    model = build_model(x_proj=2, y_proj=3)
    add_child(model, "first", {"x_proj": ["a", "b"], "y_proj": ["a", "b"], "z_proj": ["a"]})
    assert complete_mapping(model, {}) == {"x_proj": ["a", "b"]}
    add_child(model, "second", {"x_proj": ["a", "b"]})
    assert complete_mapping(model, {}) == {"x_proj": ["a", "b"]}
    add_child(model, "third", {"x_proj": ["b", "a"]})
    assert complete_mapping(model, {}) == {}


def test_noted_modules_come_first() -> None:
    model = build_model(x_proj=2)
    set_notes(model.x_proj, modules=("a", "b"))
    assert complete_mapping(model, {"x_proj": ["x_proj"]}) == {"x_proj": ["a", "b"]}
