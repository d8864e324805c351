"""Tests of experts' layouts on real model classes: all fill the same slots, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_files import build_files
from support.families.family import COMMON, GDN
from support.families.qwen3_5 import _VISION
from support.layouts import PREFIX, Files
from support.models import RankModel
from support.moe import EXPERTS, HIDDEN, INTERMEDIATE, RANK, flat

import vllm_nway_lora

_SIZES = {
    "hidden_size": HIDDEN,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INTERMEDIATE,
}
#: Model -> its configuration, and what precedes ``layers`` in its checkpoint.
MODELS: dict[str, tuple[Mapping[str, Any], str]] = {
    "Qwen3 MoE": (
        {
            **COMMON,
            **_SIZES,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_hidden_layers": 1,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "model.",
    ),
    "Qwen3.5 MoE, multimodal": (
        {
            "model_type": "qwen3_5_moe",
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": {
                **GDN,
                **_SIZES,
                "model_type": "qwen3_5_moe_text",
                "shared_expert_intermediate_size": INTERMEDIATE,
            },
            "vision_config": {**_VISION, "model_type": "qwen3_5_moe", "out_hidden_size": HIDDEN},
        },
        "model.language_model.",
    ),
}


def write(modules: Mapping[str, Any], changes: Mapping[str, Any], root: str) -> Files:
    """Return the files of an adapter on the experts of layer 0."""
    tensors = {}
    for name, given in modules.items():
        module = f"{PREFIX}{root}layers.0.mlp.experts{name and f'.{name}'}"
        for half, tensor in (("A", given.a), ("B", given.b)):
            if tensor is not None:
                tensors[f"{module}.lora_{half}.weight"] = tensor
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "peft_version": "0.21.2",
    }
    return Files(tensors, {k: v for k, v in {**config, **changes}.items() if v is not None})


def slots(rank: RankModel, folder: Path) -> list[torch.Tensor]:
    """Return the slots of an adapter in the mixture of layer 0."""
    rank.add_adapter("adapter", 1, folder)
    manager = rank.worker_manager._adapter_manager
    slot = manager.lora_index_to_id.index(1)
    [layer] = [of for name, of in manager.modules.items() if name.endswith("layers.0.mlp.experts")]
    stacks = (
        *layer.w13_lora_a_stacked,
        *layer.w13_lora_b_stacked,
        *layer.w2_lora_a_stacked,
        *layer.w2_lora_b_stacked,
    )
    found = [stack[slot].clone() for stack in stacks]
    rank.remove_adapter(1)
    return found


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["unsharded", "sharded"])
@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize("model", MODELS)
def test_layouts_of_experts_fill_the_same_slots(
    model: str, size: int, fully_sharded: bool, tmp_path: Path
) -> None:
    vllm_nway_lora.register()
    config, root = MODELS[model]
    layouts = build_files(flat(), False)
    cases = {name: (*of, root) for name, of in layouts.items()}
    cases |= {f"{name}, bare names": (*of, "") for name, of in layouts.items()}
    for number in range(size):
        rank = RankModel(config, number, size, fully_sharded)
        rank.wrap()
        first, *others = (
            slots(rank, write(*case).save(tmp_path / f"{number} {name}"))
            for name, case in cases.items()
        )
        # Fully sharded, the second rank has the upper half of the slots' rank: none of this LoRA-A.
        assert all(bool(tensor.any()) for tensor in (first if number == 0 else first[-1:]))
        for name, found in zip(list(cases)[1:], others, strict=True):
            assert all(map(torch.equal, found, first)), name
