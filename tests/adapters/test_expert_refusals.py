"""Layouts of experts with two meanings or none are refused, and the words say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.expert_truth import (
    NEW,
    PATH,
    SQUARE_DOWN,
    SQUARE_GATE_UP,
    UNTOLD,
    build_mixture,
)

from vllm_nway_lora.adapters.expert_layouts import translate_experts
from vllm_nway_lora.adapters.expert_types import Given, Half, Swaps
from vllm_nway_lora.adapters.target import LayoutError, Pair


def pair(a: tuple[int, ...], b: tuple[int, ...], scaling: float = 2.0) -> Pair:
    return Pair(torch.ones(a), torch.ones(b), scaling)


#: Case -> changes of the mixture (12 columns, 5 rows), modules, configuration, words of the refusal.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Given], dict[str, Any], str]] = {
    "square, no release": (
        SQUARE_DOWN,
        {"": pair((8, 5), (5, 8))},
        {},
        f"module {PATH} (layer {PATH}, Layer): it is down_proj alone and has as many columns as rows, 5, so that its shapes do "
        "not tell whether they are swapped, and `peft_version` in adapter_config.json is None. Set the "
        'release of PEFT that has saved the adapter, such as "0.19.0"',
    ),
    "square, development version": (
        SQUARE_GATE_UP,
        {"": pair((8, 10), (10, 8))},
        {"peft_version": "0.18.2.dev0"},
        "it is gate_up_proj alone and has as many columns as rows, 10, so that its shapes do not tell "
        "whether they are swapped, and `peft_version` in adapter_config.json is '0.18.2.dev0'",
    ),
    "square, storage not known": (
        SQUARE_DOWN | {"swaps": UNTOLD},
        {"": pair((8, 5), (5, 8))},
        NEW,
        "the release of PEFT does not tell either. Save the adapter with both parameters, or apart for",
    ),
    "GPT-OSS, PEFT 0.19": (
        SQUARE_DOWN | {"swaps": Swaps(old=False, new=None)},
        {"": pair((8, 5), (5, 8))},
        NEW,
        "the release of PEFT does not tell either",
    ),
    "one of two is swapped": (
        {},
        {"base_layer": pair((8, 12), (10, 8)), "": pair((8, 12), (5, 8))},
        NEW,
        "columns and rows are swapped in one of its two parameters only",
    ),
    "twice the same parameter": (
        {},
        {"base_layer": pair((8, 12), (10, 8)), "": pair((8, 12), (10, 8))},
        NEW,
        f"module {PATH} and module {PATH}.base_layer both have the shapes of gate_up_proj",
    ),
    "other sizes": (
        {},
        {"": pair((8, 6), (12, 8))},
        NEW,
        "expected 12 columns and 10 rows as gate_up_proj or 5 columns and 12 rows as down_proj, found "
        "LoRA-A of 6 columns and LoRA-B of 12 rows",
    ),
    "other number of experts": (
        {},
        {"": pair((16, 5), (12, 16))},
        {"r": 2},
        "expected down_proj of 4 experts of rank 2, as adapter_config.json says, found rank 4",
    ),
    "other rank than the pattern's": (
        {},
        {"": pair((8, 12), (10, 8))},
        {"r": 2, "rank_pattern": {"gate_up_proj": 4}},
        "expected gate_up_proj of 4 experts of rank 4, as adapter_config.json says, found rank 2",
    ),
    "none of two ranks": (
        {},
        {"": pair((4, 12), (10, 4))},
        {"r": 2, "rank_pattern": {"other.gate_up_proj": 4}},
        "expected gate_up_proj of 4 experts of rank 2 or 4, as adapter_config.json says, found rank 1",
    ),
    "experts do not divide": (
        {},
        {"": pair((6, 5), (12, 6))},
        {},
        "expected the tensors of 4 experts, LoRA-A (4 * r, columns) and LoRA-B (rows, r * 4), or (4, r, "
        "columns) and (rows, r, 4) or (4, rows, r), found LoRA-A (6, 5) and LoRA-B (12, 6)",
    ),
    "ranks of A and B": ({}, {"": pair((8, 5), (12, 4))}, {}, "expected the tensors of 4 experts"),
    "three dimensions, no experts": (
        {},
        {"": pair((3, 2, 5), (12, 2, 3))},
        {},
        "expected the tensors of 4 experts",
    ),
    "nested half": (
        {},
        {"": Half(torch.ones(8, 5), None)},
        {},
        f"module {PATH} (layer {PATH}, Layer): it has LoRA-A but no LoRA-B",
    ),
    "no gate, name untold": (
        {"is_gated": False},
        {"": pair((8, 5), (12, 8))},
        NEW | {"target_parameters": ["experts.up_proj", "experts.down_proj"]},
        "its shapes fit up_proj and down_proj. `target_parameters` in adapter_config.json must name one "
        "of both, and has ['down_proj', 'up_proj']",
    ),
    "no gate, gate": (
        {"is_gated": False},
        {"0.gate_proj": pair((2, 12), (5, 2))},
        {},
        "the model's experts have up_proj and down_proj only",
    ),
    "no gate, stacked": (
        {"is_gated": False, "is_stacked": True},
        {"0.up_proj": pair((2, 12), (5, 2))},
        {},
        "the model's experts have no gate_proj. Do not set is_3d_lora_weight in the request",
    ),
    "unknown setting": (
        {},
        {"": pair((8, 5), (12, 8))},
        {"vllm_nway_lora": {"expert_lora_b": "columns"}},
        "adapter_config.json has vllm_nway_lora={'expert_lora_b': 'columns'}: expected "
        '{"expert_lora_b": "expert-major"} or {"expert_lora_b": "rank-major"}',
    ),
    "three parameters": (
        {},
        {"base_layer.base_layer": pair((8, 5), (12, 8))},
        {},
        f"module {PATH}.base_layer.base_layer (layer {PATH}, Layer): no module of a mixture has this name. They are "
        "gate_proj, up_proj, down_proj, gate_up_proj, w1, w3, w2, with or without the number of an "
        "expert before",
    ),
    "unknown name": (
        {},
        {"0.c_fc": pair((2, 12), (5, 2))},
        {},
        "no module of a mixture has this name",
    ),
    "an expert more": (
        {},
        {"4.w1": pair((2, 12), (5, 2))},
        {},
        f"module {PATH}.4.w1 (layer {PATH}, Layer): the model has experts 0 to 3. Use the adapter",
    ),
    "two names": (
        {},
        {"0.w1": pair((2, 12), (5, 2)), "0.gate_proj": pair((2, 12), (5, 2))},
        {},
        f"module {PATH}.0.w1 and module {PATH}.0.gate_proj are the same projection",
    ),
    "nested and apart": (
        {},
        {"": pair((8, 5), (12, 8)), "0.w2": pair((2, 5), (12, 2))},
        NEW,
        f"module {PATH}.0.w2 (layer {PATH}, Layer): module {PATH} has down_proj of all experts too",
    ),
    "gate_up and gate": (
        {},
        {"": pair((8, 12), (10, 8)), "0.w1": pair((2, 12), (5, 2))},
        NEW,
        "it has gate_up_proj, and gate_proj of its own too",
    ),
    "stacked and apart": (
        {},
        {"w1": pair((4, 2, 12), (4, 5, 2)), "0.w1": pair((2, 12), (5, 2))},
        {},
        "are the same",
    ),
    "gate_up of an expert, alternating": (
        {"is_interleaved": True},
        {"0.gate_up_proj": pair((2, 12), (10, 2))},
        {},
        "nothing tells whether its rows of gate and up alternate. Save gate_proj and up_proj apart, or",
    ),
    "stacked, two dimensions": (
        {},
        {"w1": pair((8, 12), (5, 8))},
        {},
        f"module {PATH}.w1 (layer {PATH}, Layer): expected LoRA-A (4, r, 12), or (1, r, 12) for a matrix that its experts "
        "share, found (8, 12)",
    ),
    "stacked, other experts": (
        {},
        {"w2": pair((4, 2, 5), (3, 12, 2))},
        {},
        "expected LoRA-B (4, 12, r), or (1, 12, r) for a matrix that its experts share, found (3, 12, 2)",
    ),
    "stacked, other width": (
        {},
        {"w2": pair((4, 2, 12), (4, 5, 2))},
        {},
        f"module {PATH}.w2 (layer {PATH}, Layer): expected LoRA-A (r, 5) and LoRA-B (12, r), found (2, 12) and (5, 2)",
    ),
    "apart, other width": (
        {},
        {"0.w2": pair((2, 12), (5, 2))},
        {},
        f"module {PATH}.0.w2 (layer {PATH}, Layer): expected LoRA-A (r, 5) and LoRA-B (12, r), found (2, 12) and (5, 2)",
    ),
    "apart, three dimensions": (
        {},
        {"0.w2": pair((1, 2, 5), (1, 12, 2))},
        {},
        "expected two-dimensional tensors",
    ),
    "apart, ranks": (
        {},
        {"0.w2": pair((2, 5), (12, 3))},
        {},
        "the ranks of LoRA-A (2, 5) and LoRA-B",
    ),
    "apart, other rank": (
        {},
        {"0.w2": pair((2, 5), (12, 2))},
        {"r": 4},
        f"module {PATH}.0.w2 (layer {PATH}, Layer): adapter_config.json says rank 4, found LoRA-A (2, 5) and LoRA-B (12, 2)",
    ),
    "stacked, other rank": (
        {},
        {"w2": pair((4, 2, 5), (4, 12, 2))},
        {"r": 2, "rank_pattern": {r"experts\.w2": 8}},
        f"module {PATH}.w2 (layer {PATH}, Layer): adapter_config.json says rank 8, found LoRA-A (2, 5) and LoRA-B (12, 2)",
    ),
    "apart, half": (
        {},
        {"0.w2": pair((2, 5), (12, 2)), "1.w2": Half(None, torch.ones(12, 2))},
        {},
        f"module {PATH}.1.w2 (layer {PATH}, Layer): it has LoRA-B but no LoRA-A",
    ),
    "shared half alone": (
        {},
        {"gate_proj": Half(torch.ones(1, 2, 12), None)},
        {},
        f"module {PATH}.gate_proj (layer {PATH}, Layer): it has LoRA-A but no LoRA-B",
    ),
    "shared half and a whole": (
        {},
        {"gate_proj": Half(torch.ones(1, 2, 12), None), "0.gate_proj": pair((2, 12), (5, 2))},
        {},
        f"module {PATH}.gate_proj has LoRA-A of all experts, and module {PATH}.0.gate_proj has one too",
    ),
    "halves of two scalings": (
        {},
        {
            "gate_proj": Half(torch.ones(1, 2, 12), None, 1.0),
            "0.gate_proj": Half(None, torch.ones(5, 2), 2.0),
        },
        {},
        f"module {PATH}.0.gate_proj (layer {PATH}, Layer): its scaling is 2, that of its LoRA-A in module {PATH}.gate_proj is 1",
    ),
}
REFUSED["stacked and apart"] = (
    *REFUSED["stacked and apart"][:3],
    f"module {PATH}.w1 has LoRA-A of all experts, and module {PATH}.0.w1 has one too",
)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changes, pairs, config, words = REFUSED[case]
    with pytest.raises(LayoutError) as error:
        translate_experts(pairs, build_mixture(**changes), config)
    assert words in str(error.value)
