"""The tables of known fusions."""

from __future__ import annotations

import pytest

from vllm_nway_lora.models.tables import OUTPUTS, outputs_by_module


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
