"""Variants whose tensors do not fit are refused; the words name the module and all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nway_lora.adapters.forms import PREFIX
from vllm_nway_lora.adapters.target import LayoutError
from vllm_nway_lora.adapters.variants import fold

Tensors = dict[str, torch.Tensor]


def loha(rank: int, **shapes: tuple[int, int]) -> Tensors:
    parts = {"w1_a": (5, rank), "w1_b": (rank, 3), "w2_a": (5, rank), "w2_b": (rank, 3)} | shapes
    return {f"{PREFIX}q_proj.hada_{name}": torch.ones(shape) for name, shape in parts.items()}


def adalora(**shapes: tuple[int, ...]) -> Tensors:
    parts = {"A": (2, 3), "B": (4, 2), "E": (2, 1)} | shapes
    return {f"{PREFIX}q_proj.lora_{name}": torch.ones(shape) for name, shape in parts.items()}


VERA = {
    "base_model.vera_A": torch.ones(2, 3),
    "base_model.vera_B": torch.ones(4, 2),
    f"{PREFIX}q_proj.vera_lambda_d": torch.ones(2),
    f"{PREFIX}q_proj.vera_lambda_b": torch.ones(4),
}


def without(tensors: Tensors, end: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


#: Case -> tensors, configuration, the words of the refusal.
REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "AdaLoRA, no E": (without(adalora(), "_E"), {"peft_type": "ADALORA"}, "module q_proj: ADALORA needs lora_A, lora_B, lora_E, and the file has lora_A, lora_B. Save"),
    "AdaLoRA, two ranks": (adalora(E=(3, 1)), {"peft_type": "ADALORA"}, r"lora_E \(r, 1\), found lora_A \(2, 3\), lora_B \(4, 2\), lora_E \(3, 1\). Save"),
    "LoHa, rank": (loha(23), {"peft_type": "LOHA", "r": 23, "alpha": 1}, "module q_proj: LOHA folds into LoRA of rank 529, and vLLM has slots for at most 512. Merge"),
    "LoHa, other rank": (loha(2), {"peft_type": "LOHA", "r": 3, "alpha": 1}, r"where adapter_config.json gives r=3, found hada_w1_a \(5, 2\)"),
    "LoHa, columns": (loha(2, w2_b=(2, 4)), {"peft_type": "LOHA", "r": 2, "alpha": 1}, r"hada_w2_b \(2, 4\). Save"),
    "LoHa, no w2": (without(loha(2), "w2_a"), {"peft_type": "LOHA", "r": 2, "alpha": 1}, "needs hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and the file has"),
    "LoKr, rank": ({f"{PREFIX}q_proj.lokr_w1": torch.ones(30, 30), f"{PREFIX}q_proj.lokr_w2": torch.ones(30, 30)}, {"peft_type": "LOKR", "r": 90, "alpha": 1}, "module q_proj: LOKR folds into LoRA of rank 900, and vLLM"),
    "LoKr, no w2": ({f"{PREFIX}q_proj.lokr_w1": torch.ones(3, 3)}, {"peft_type": "LOKR", "r": 2, "alpha": 1}, "LOKR needs lokr_w2_a, lokr_w2_b, and the file has lokr_w1"),
    "LoKr, ranks": ({f"{PREFIX}q_proj.lokr_w1": torch.ones(3, 3), f"{PREFIX}q_proj.lokr_w2_a": torch.ones(3, 2), f"{PREFIX}q_proj.lokr_w2_b": torch.ones(3, 3)}, {"peft_type": "LOKR", "r": 2, "alpha": 1}, r"expects lokr_w2_a \(rows, r\)"),
    "LoKr, convolution": ({f"{PREFIX}q_proj.lokr_w1": torch.ones(3, 3), f"{PREFIX}q_proj.lokr_w2": torch.ones(3, 3, 3, 3)}, {"peft_type": "LOKR", "r": 2, "alpha": 1}, "lokr_w2 of two dimensions"),
    "VeRA, no projections": (without(VERA, "vera_A"), {"peft_type": "VERA"}, "VERA needs vera_A, vera_B, vera_lambda_b, vera_lambda_d, and the file has vera_B"),
    "VeRA, rows": (VERA | {f"{PREFIX}q_proj.vera_lambda_b": torch.ones(5)}, {"peft_type": "VERA"}, r"vera_lambda_b \(at most rows\), found"),
    "BD-LoRA, blocks": ({f"{PREFIX}q_proj.lora_A.weight": torch.ones(4, 3)}, {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 3}}, r"module q_proj: adapter_config.json divides LoRA-A into 3 blocks, found \(4, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_module_and_all_shapes(case: str) -> None:
    tensors, config, words = REFUSED[case]
    with pytest.raises(LayoutError, match=words):
        fold(tensors, config)
