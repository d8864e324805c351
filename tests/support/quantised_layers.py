"""Models with quantised layers on one rank, without weights, and the LoRA layers on them.

Their classes, their parameters and the LoRA layers are vLLM's own. Where the CPU platform has no kernel
for a format, a GPU's is chosen, which can be built but cannot compute. The releases' names are those of
0.32.0 and 0.33.0, which have no bitsandbytes any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import PlatformEnum

from support import oracle_cases as cases
from support.models import import_classes, save_config
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.options import ServerOptions

MAX_RANK = 8

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3.5": {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {
            **_SMALL,
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
        },
    },
    # Its only group is on both ranks.
    "Granite 4": {
        **_SMALL,
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 64,
        "mamba_d_head": 16,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
        "mamba_expand": 8,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 64,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "attention_multiplier": 0.125,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "position_embedding_type": "rope",
    },
}
#: Too narrow for groups and blocks; published checkpoints keep their weights too.
_KEPT = [f"model.language_model.layers.0.linear_attn.in_proj_{half}" for half in "ab"]


@dataclass(frozen=True)
class Format:
    """A format of quantised weights.

    Attributes:
        name: its usual name.
        method: vLLM's name of its configuration class.
        config: the checkpoint's ``quantization_config``.
        parameter: the name and the dtype of a parameter that only its layers have.
    """

    name: str
    method: str
    config: Mapping[str, Any] = field(repr=False)
    parameter: tuple[str, torch.dtype]


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *_KEPT],
    }


def _number(bits: int, strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, **fields}


_FP8, _BYTES, _WORDS = torch.float8_e4m3fn, torch.uint8, torch.int32
_NVFP4 = _number(4, "tensor_group", group_size=16)
_MXFP4 = _number(4, "group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")
_INT4 = _number(4, "group", group_size=32, dynamic=False) | {"type": "int"}
FORMATS = (
    Format(
        "GPTQ",
        "gptq",
        {
            "bits": 4,
            "group_size": 32,
            "desc_act": False,
            "sym": True,
            "dynamic": {r"-:.*\.in_proj_(a|b|ba)$": {}},
        },
        ("qweight", _WORDS),
    ),
    Format(
        "AWQ",
        "awq",
        {"bits": 4, "group_size": 32, "zero_point": True, "modules_to_not_convert": _KEPT},
        ("qweight", _WORDS),
    ),
    Format(
        "compressed-tensors W4A16",
        "compressed-tensors",
        _compressed("pack-quantized", _INT4, None),
        ("weight_packed", _WORDS),
    ),
    Format("FP8", "fp8", {"activation_scheme": "dynamic"}, ("weight", _FP8)),
    Format(
        "FP8 in blocks",
        "fp8",
        {"activation_scheme": "dynamic", "weight_block_size": [32, 32], "ignored_layers": _KEPT},
        ("weight", _FP8),
    ),
    Format(
        "compressed-tensors FP8",
        "compressed-tensors",
        _compressed("float-quantized", _number(8, "channel"), _number(8, "token", dynamic=True)),
        ("weight", _FP8),
    ),
    Format(
        "compressed-tensors NVFP4",
        "compressed-tensors",
        _compressed("nvfp4-pack-quantized", _NVFP4, {**_NVFP4, "dynamic": "local"}),
        ("weight_packed", _BYTES),
    ),
    Format(
        "ModelOpt NVFP4",
        "modelopt_fp4",
        {
            "quant_algo": "NVFP4",
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": None,
                "group_size": 16,
                "exclude_modules": _KEPT,
            },
        },
        ("weight", _BYTES),
    ),
    Format(
        "compressed-tensors MXFP4",
        "compressed-tensors",
        _compressed("mxfp4-pack-quantized", _MXFP4, {**_MXFP4, "dynamic": True}),
        ("weight_packed", _BYTES),
    ),
)

#: vLLM's table of kernels -> the one that is chosen where the CPU platform has none.
_KERNELS = {
    "_POSSIBLE_FP8_BLOCK_KERNELS": "TritonFp8BlockScaledMMKernel",
    "_POSSIBLE_NVFP4_KERNELS": "EmulationNvFp4LinearKernel",
    "_POSSIBLE_MXFP4_KERNELS": "EmulationMxfp4LinearKernel",
}


@contextmanager
def _with_gpu_kernels() -> Iterator[None]:
    """Have vLLM choose a GPU's kernels on the CPU platform."""
    accept = classmethod(lambda *_: (True, None))
    with ExitStack() as stack:
        for table, name in _KERNELS.items():
            kernel: Any = getattr(kernels, name)
            chosen = type(name, (kernel,), {"is_supported": accept, "can_implement": accept})
            entry = {PlatformEnum.CPU: [chosen]}
            stack.enter_context(mock.patch.dict(getattr(kernels, table), entry))
        yield


def build(
    folder: Path, model: str, form: Format | None, rank: int, size: int, fully_sharded: bool
) -> offline.Rank:
    """Build a model of :data:`MODELS` on one rank and have vLLM wrap it for LoRA.

    Args:
        folder: an empty folder for its configuration.
        model: its name.
        form: the format of its weights; None for float weights.
        rank: of the tensor-parallel group.
        size: of the tensor-parallel group.
        fully_sharded: ``--fully-sharded-loras``.
    """
    import_classes(MODELS[model])
    save_config(folder, MODELS[model])
    options = ServerOptions(
        tensor_parallel_size=size, fully_sharded_loras=fully_sharded, max_lora_rank=MAX_RANK
    )
    built = offline.configure(str(folder), rank, options)
    if form:
        config_class = get_quantization_config(form.method)
        config = config_class.from_config({**form.config, "quant_method": form.method})
        built.vllm_config.quant_config = config
    with _with_gpu_kernels():
        offline.build(built)
        built.wrap()
    return built


def save_adapter(folder: Path, model: str) -> Path:
    """Save an adapter on every linear module of a model's text part."""
    import transformers

    source = folder / "config"
    source.mkdir(parents=True)
    save_config(source, MODELS[model])
    [architecture] = MODELS[model]["architectures"]
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        empty = getattr(transformers, architecture)(config)
    shapes = {
        name: module.weight.shape
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    return cases.save_adapter(folder / "adapter", shapes, list(shapes))


def load(rank: offline.Rank, adapter: Path) -> dict[str, list[torch.Tensor]]:
    """Load an adapter as a worker does; return the slots of each linear layer by path."""
    with rank.current():
        rank.worker_manager.add_adapter(LoRARequest("adapter", 1, str(adapter)))
    return {
        path: [*layer.lora_a_stacked, *layer.lora_b_stacked]
        for path, layer in rank.lora_manager.modules.items()
        if isinstance(layer, BaseLinearLayerWithLoRA)
    }
