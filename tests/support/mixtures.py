"""Models with experts, and vLLM's LoRA layers on them, without a kernel.

The constructors of vLLM's LoRA layers on experts need a GPU's kernels, so their attributes are set here.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.config.lora import LoRAConfig
from vllm.lora import utils
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from support.models import RankModel
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.layers.claims import plan_against_stock
from vllm_nway_lora.models.prepare import prepare_and_map
from vllm_nway_lora.rows.notes import get_notes

EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 32
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}
_QWEN3 = {
    "num_experts": EXPERTS,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 96,
    "head_dim": 16,
}
_BOTH = {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", **_QWEN3, "mlp_only_layers": []},
    "MixtralForCausalLM": {"model_type": "mixtral", **_BOTH},
    "OlmoeForCausalLM": {
        "model_type": "olmoe",
        "num_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
    },
    "GptOssForCausalLM": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "layer_types": ["full_attention"] * 3,
        **_BOTH,
    },
    "Llama4ForCausalLM": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
        **_BOTH,
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            **COMMON,
            **_QWEN3,
            "shared_expert_intermediate_size": INTERMEDIATE,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": {
            "model_type": "qwen3_5_moe",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
        },
    },
}


def build(architecture: str, rank: int, size: int, expert_parallel: bool = False) -> RankModel:
    """Build a model of :data:`CONFIGS` on one rank; ``expert_parallel``: ``--enable-expert-parallel``."""
    config = CONFIGS[architecture]
    common = {} if "text_config" in config else COMMON
    configure = offline.configure

    def change(*args: Any, **kwargs: Any) -> offline.Rank:
        found = configure(*args, **kwargs)
        found.vllm_config.parallel_config.enable_expert_parallel = expert_parallel
        return found

    with mock.patch.object(offline, "configure", change):
        return RankModel({**common, **config, "architectures": [architecture]}, rank, size)


def find_mixtures(model: nn.Module) -> dict[str, Any]:
    """Return the layers that vLLM's LoRA layers on experts replace, by path."""
    classes = ("FusedMoE", "SharedFusedMoE", "MoERunner")
    return {p: layer for p, layer in model.named_modules() if type(layer).__name__ in classes}


def wrap(layer: Any, is_stacked: bool, model_config: Any, fully_sharded: bool = False) -> Any:
    """Return vLLM's LoRA layer on a mixture."""
    layer_class = FusedMoE3DWithLoRA if is_stacked else FusedMoEWithLoRA
    lora_layer = layer_class.__new__(layer_class)
    nn.Module.__init__(lora_layer)
    config = layer.moe_config
    lora_layer.base_layer = layer
    lora_layer.moe_config, lora_layer.device = config, torch.device("cpu")
    lora_layer.tp_size = config.moe_parallel_config.tp_size
    lora_layer.tp_rank = config.moe_parallel_config.tp_rank
    lora_layer._w13_slices = 1 if is_stacked or not config.is_act_and_mul else 2
    lora_layer.enable_moe_shared_loras = False
    lora_config = LoRAConfig(
        max_lora_rank=8, max_loras=1, lora_dtype=torch.float32, fully_sharded_loras=fully_sharded
    )
    lora_layer.create_lora_weights(1, lora_config, model_config)
    return lora_layer


def trace_and_wrap(rank: RankModel, fully_sharded: bool = False) -> dict[str, Any]:
    """Trace a model as a worker does, and return vLLM's LoRA layers on its mixtures by path."""
    model: Any = rank.model

    def run() -> dict[str, Any]:
        prepare_and_map(utils.process_packed_modules_mapping, None, (model,), {})
        wrapped = {}
        for path, layer in find_mixtures(model).items():
            mixture = get_notes(layer).mixture
            is_stacked = mixture.is_stacked if mixture else model.is_3d_moe_weight
            wrapped[path] = wrap(
                layer, is_stacked, rank.vllm_config.model_config.hf_config, fully_sharded
            )
            plan_against_stock(layer, [], wrapped[path])
        return wrapped

    found: dict[str, Any] = rank.run_as_rank(run)
    return found
