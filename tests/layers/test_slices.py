"""Slices wider than their modules: columns of no module keep the base layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import layers
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from vllm_nway_lora.diagnosis.offline import Rank, initialize
from vllm_nway_lora.diagnosis.stand_ins import StandInGroup
from vllm_nway_lora.layers.nway import NWayLinearWithLoRA
from vllm_nway_lora.rows.notes import set_notes
from vllm_nway_lora.rows.plan import Output, build_plan

#: Two columns of padding, four of x in another order, one of padding, three of y, two of padding.
X, Y = (1, 0, 3, 2), (0, 1, 2)
COLUMNS = {"x": [-1, -1, *X, -1, -1, -1, -1, -1, -1], "y": [-1] * 7 + [*Y, -1, -1]}
RANK, WIDTH = 4, 12


@pytest.fixture
def layer() -> Iterator[Any]:
    initialize()
    with Rank(StandInGroup(0, 1), VllmConfig()).current():
        base = MergedColumnParallelLinear(
            layers.INPUT_SIZE,
            [8, 4],
            bias=False,
            params_dtype=torch.float32,
            prefix="model.layers.0.padded",
        )
        base.weight.data.copy_(torch.arange(base.weight.numel()).view_as(base.weight) % 7)
        base.quant_method.process_weights_after_loading(base)
        outputs = [Output(len(o), torch.tensor(COLUMNS[m])) for m, o in (("x", X), ("y", Y))]
        set_notes(base, plan=build_plan("padded", list(COLUMNS), [[0], [1]], outputs))
        layer = NWayLinearWithLoRA(base)
        config = LoRAConfig(max_lora_rank=8, max_loras=2, lora_dtype=torch.float32)
        layer.create_lora_weights(2, config)
        yield layer


def test_run_is_written_at_its_offset(layer: Any) -> None:
    a = torch.ones(RANK, layers.INPUT_SIZE)
    b = [torch.arange(1.0, 5).repeat(RANK, 1).T, torch.arange(5.0, 8).repeat(RANK, 1).T]
    assert layer.output_slices == (7, 5)
    for modules, rows in (
        ((0, 1), [0, 0, 2, 1, 4, 3, 0, 5, 6, 7, 0, 0]),
        ((0,), [0, 0, 2, 1, 4, 3, 0, 0, 0, 0, 0, 0]),
        ((1,), [0, 0, 0, 0, 0, 0, 0, 5, 6, 7, 0, 0]),
    ):
        present = [b[m] if m in modules else None for m in (0, 1)]
        layer.set_lora(1, [a if m in modules else None for m in (0, 1)], present)
        held = torch.cat([stack[1, 0, :, 0] for stack in layer.lora_b_stacked])
        assert held.tolist() == rows
        assert not any(stack[0].any() for stack in layer.lora_b_stacked)


def test_columns_of_no_module_keep_the_base_layers_output(layer: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    x = random(layers.TOKENS, layers.INPUT_SIZE)
    a = [random(RANK, layers.INPUT_SIZE) for _ in COLUMNS]
    b = [random(4, RANK), random(3, RANK)]
    before, _ = layer.base_layer(x)
    layer.set_lora(1, a, b)
    punica = layers.punica_wrapper()
    layer.set_mapping(punica)
    layers.map_tokens(punica, (1,) * layers.TOKENS)
    expected = before.clone()
    for column, rows, lora_a, lora_b in zip(COLUMNS.values(), (X, Y), a, b):
        expected[:, torch.tensor(column) >= 0] += x @ lora_a.T @ lora_b[list(rows)].T
    output, _ = layer(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
