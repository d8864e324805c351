# SPDX-License-Identifier: Apache-2.0
"""The one list of vLLM's attributes that this package replaces, and of those that it needs for it.

A replacement is named as ``module:function`` of this package and imported when its group is
applied, so that a process imports only the rooms that it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import wrapt

from vllm_nway_lora.compat import defects
from vllm_nway_lora.compat.patching import Group, Need, Patch


def _load(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    loaded: Callable[..., Any] = getattr(
        importlib.import_module(f"vllm_nway_lora.{module}"), function
    )
    return loaded


def _wrapped_by(path: str) -> Callable[[Any], Any]:
    """Return a replacement that wraps a function in a wrapt wrapper of this package."""
    return lambda original: wrapt.FunctionWrapper(original, _load(path))


def _replaced_by(path: str) -> Callable[[Any], Any]:
    """Return a replacement that calls a function of this package with the original attribute."""
    return lambda original: _load(path)(original)


_COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
_MAMBA2 = "vllm.model_executor.layers.mamba.mamba_mixer2"
_SERVING = "vllm.entrypoints.openai.models.serving"

GROUPS = (
    # In the workers: exact layers, and whole adapters only.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "lora-layer-class",
                Need("vllm.lora.utils", "_all_lora_classes"),
                _replaced_by("layers.classes:put_our_classes_first"),
            ),
            Patch(
                "packed-modules-mapping",
                Need("vllm.lora.model_manager", "process_packed_modules_mapping", ("model",)),
                _wrapped_by("models.prepare:prepare_and_map"),
            ),
            Patch(
                "admission",
                Need(
                    "vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("lora_request",)
                ),
                _wrapped_by("adapters.admission:load_adapter"),
            ),
            Patch(
                "adapter-tensors",
                Need(
                    "vllm.lora.lora_model",
                    "LoRAModel.from_lora_tensors",
                    ("tensors", "peft_helper", "weights_mapper"),
                ),
                _wrapped_by("adapters.tensors:validate_tensors"),
            ),
            Patch(
                "adapter-config",
                Need("vllm.lora.peft_helper", "PEFTHelper.from_dict", ("config_dict",)),
                _wrapped_by("adapters.config:validate_config"),
            ),
        ),
        (
            "fewer-modules-than-outputs",
            "first-module-left-out",
            "last-module-left-out",
            "unwrapped-when-fully-sharded",
            "one-module-cut-in-halves",
            "gathered-when-whole",
            "whole-layer-gathered",
            "copied-lora-a",
            "llama4-rotary-rows",
            "misnamed-modules",
            "served-in-part",
            "patterns-ignored",
            "bias-for-matrix",
        ),
        (
            Need(_COLUMN_PARALLEL, "_mcp_apply", ("x", "bias", "layer")),
            Need(_COLUMN_PARALLEL, "ColumnParallelLinearWithLoRA.apply", ("x", "bias")),
            Need(
                "vllm.lora.utils",
                "from_layer",
                ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"),
            ),
            Need(
                "vllm.model_executor.layers.linear",
                "MergedColumnParallelLinear.weight_loader",
                ("param", "loaded_weight", "loaded_shard_id"),
            ),
        ),
    ),
    # In the engine core: an adapter is loaded by all ranks or by none, and its failure does not
    # end the engine.
    Group(
        "vllm.v1.engine.core",
        (
            Patch(
                "all-ranks-or-none",
                Need("vllm.v1.executor.abstract", "Executor.add_lora", ("lora_request",)),
                _wrapped_by("engine.loading:add_lora"),
            ),
            Patch(
                "request-alone-fails",
                Need("vllm.v1.engine.core", "EngineCore.add_request", ("request",)),
                _wrapped_by("engine.requests:add_request"),
            ),
            Patch(
                "same-plugin-on-all-ranks",
                Need(
                    "vllm.v1.engine.core", "EngineCore.__init__", ("vllm_config", "executor_class")
                ),
                _wrapped_by("engine.agreement:start_engine"),
            ),
        ),
        ("stale-replies", "request-ends-engine"),
    ),
    # In the API server.
    Group(
        _SERVING,
        (
            Patch(
                "load-inplace-once",
                Need(_SERVING, "OpenAIServingModels.load_lora_adapter", ("request",)),
                _wrapped_by("engine.server:reset_load_inplace"),
            ),
        ),
        ("reloaded-every-step",),
    ),
    # vLLM does the same from 0.22.0 on.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "layers-of-two-names",
                Need("vllm.lora.model_manager", "LoRAModelManager._create_lora_modules"),
                _wrapped_by("layers.aliases:create_lora_modules"),
            ),
        ),
        ("two-names-two-layers",),
    ),
    # Mamba2 sets a loader on the weight of its `in_proj`. CPU packing and quantisation drop that
    # parameter, and the loader with it.
    Group(
        _MAMBA2,
        (
            Patch(
                "mamba2-loader",
                Need(_MAMBA2, "MambaMixer2.__init__"),
                _wrapped_by("models.mamba2:save_weight_loader"),
            ),
        ),
        ("mamba2-one-group",),
    ),
)


def is_needed(group: Group, version: str) -> bool:
    """Return whether ``version`` of vLLM has a defect that ``group`` fixes."""
    return any(defects.find(name).affects(version) for name in group.defects)
