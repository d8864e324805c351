"""Variants that a setting of plain LoRA names, and what folds leave alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import ANY_TIME
from torch import nn

from vllm_nway_lora.adapters.forms import PREFIX
from vllm_nway_lora.adapters.variants import fold


@given(group=st.integers(1, 6), groups=st.integers(1, 6), rank=st.integers(1, 4))
@ANY_TIME
def test_groups_are_repeated(group: int, groups: int, rank: int) -> None:
    """PEFT's ``forward`` is called as its GPTQ layer calls it; it needs no quantised weight."""
    from types import SimpleNamespace

    from peft.tuners.lora.variants import QALoraLinearVariant

    halves = [
        nn.Linear(groups, rank, bias=False, dtype=torch.float64),
        nn.Linear(rank, 5, bias=False, dtype=torch.float64),
    ]
    layer = SimpleNamespace(
        lora_A={"x": halves[0]},
        lora_B={"x": halves[1]},
        lora_dropout={"x": nn.Identity()},
        scaling={"x": 6 / rank},
        qalora_group_size={"x": group},
        in_features=group * groups,
        training=False,
    )
    inputs = torch.randn(3, group * groups, dtype=torch.float64)
    expected = QALoraLinearVariant.forward(layer, "x", inputs, torch.zeros(3, 5))
    config = {"use_qalora": True, "qalora_group_size": group, "r": rank, "lora_alpha": 6}
    tensors = {
        f"{PREFIX}q_proj.lora_{half}.weight": layer.weight.detach()
        for half, layer in zip("AB", halves, strict=True)
    }
    folded = fold(tensors, config)
    a, b = folded.tensors.values()
    torch.testing.assert_close(folded.scalings["q_proj"] * inputs @ a.T @ b.T, expected)
    # No rounding: the groups' factor is in the scaling.
    assert torch.equal(a[:, ::group], tensors[f"{PREFIX}q_proj.lora_A.weight"])


def test_folds_round_once() -> None:
    """Products of bfloat16 numbers are float32; vLLM converts them to its own type."""
    config = {"peft_type": "LOHA", "r": 2, "alpha": 2}
    parts = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 2), "hada_w2_b": (2, 3)}
    tensors = {f"q_proj.{name}": torch.randn(shape).bfloat16() for name, shape in parts.items()}
    folded = fold(tensors, config)
    assert {tensor.dtype for tensor in folded.tensors.values()} == {torch.float32}
    assert folded.rules == ("LOHA folded into LoRA of rank 4",)
    assert folded.scalings == {"q_proj": 1.0}


def test_plain_lora_is_not_copied() -> None:
    tensors = {"q_proj.lora_A.weight": torch.ones(2, 3)}
    for config in ({}, {"peft_type": "LORA"}, {"use_qalora": False, "use_bdlora": None}):
        assert fold(tensors, config).tensors is tensors


def test_mlx_lm_gives_the_factor_itself() -> None:
    """10.1 * 3 / 3 is another number."""
    tensors = {f"{PREFIX}q_proj.lora_A.weight": torch.ones(3, 3)}
    folded = fold(tensors, {"lora_parameters": {"rank": 3, "scale": 10.1}})
    assert folded.tensors is tensors
    assert folded.scalings == {"q_proj": 10.1}
