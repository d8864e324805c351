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

from vllm_nway_lora import settings
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


_COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
_SERVING = "vllm.entrypoints.openai.models.serving"
_CORE = "vllm.v1.engine.core"
_FROM_LAYER = ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config")

GROUPS = (
    # In the workers: exact layers, and whole adapters only.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "lora-layer-class",
                Need("vllm.lora.utils", "from_layer", _FROM_LAYER),
                _wrapped_by("layers.classes:build_layer"),
            ),
            Patch(
                "lora-layer-class-of-models",
                Need("vllm.lora.model_manager", "from_layer", _FROM_LAYER),
                _wrapped_by("layers.classes:build_layer"),
            ),
            Patch(
                "packed-modules-mapping",
                Need("vllm.lora.model_manager", "process_packed_modules_mapping", ("model",)),
                _wrapped_by("models.prepare:prepare_and_map"),
            ),
            Patch(
                "layers-of-two-names",
                Need("vllm.lora.model_manager", "LoRAModelManager._create_lora_modules"),
                _wrapped_by("layers.aliases:create_lora_modules"),
            ),
            Patch(
                "admission",
                Need("vllm.lora.worker_manager", "WorkerLoRAManager.__init__"),
                _wrapped_by("adapters.roads:guard_loading"),
            ),
            Patch(
                "admission-from-memory",
                Need("vllm.lora.model_manager", "LoRAModelManager._add_adapter", ("lora",)),
                _wrapped_by("adapters.roads:add_adapter"),
            ),
            Patch(
                "failed-activation",
                Need("vllm.lora.model_manager", "LoRAModelManager.activate_adapter", ("lora_id",)),
                _wrapped_by("adapters.roads:activate_adapter"),
            ),
            Patch(
                "failed-eviction",
                Need(
                    "vllm.lora.model_manager",
                    "LRUCacheLoRAModelManager.activate_adapter",
                    ("lora_id",),
                ),
                _wrapped_by("adapters.roads:activate_adapter"),
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
                "adapter-files",
                Need(
                    "vllm.lora.lora_model",
                    "LoRAModel.from_local_checkpoint",
                    ("lora_dir", "expected_lora_modules", "peft_helper"),
                ),
                _wrapped_by("adapters.files:load_checkpoint"),
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
            "mamba2-one-group",
            "experts-without-rslora",
            "read-past-lora",
            "one-module-two-outputs",
            "misnamed-modules",
            "two-names-two-layers",
            "served-in-part",
            "patterns-ignored",
            "bias-for-matrix",
        ),
        (
            Need("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("lora_request",)),
            Need(_COLUMN_PARALLEL, "_mcp_apply", ("x", "bias", "layer")),
            Need(_COLUMN_PARALLEL, "ColumnParallelLinearWithLoRA.apply", ("x", "bias")),
            Need(
                "vllm.model_executor.layers.linear",
                "MergedColumnParallelLinear.weight_loader",
                ("param", "loaded_weight", "loaded_shard_id"),
            ),
        ),
    ),
    # In the workers, on CPU: all tokens of an adapter are multiplied at once, in every LoRA layer.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "products-on-cpu",
                Need("vllm.lora.model_manager", "get_punica_wrapper"),
                _wrapped_by("layers.punica:get_punica_wrapper"),
            ),
        ),
        ("copied-per-token", "last-slot-on-cpu"),
        switch=settings.CPU_VARIABLE,
    ),
    # In the engine core: an adapter is loaded by all ranks or by none, and its failure does not
    # end the engine.
    Group(
        _CORE,
        (
            Patch(
                "all-ranks-or-none",
                Need("vllm.v1.executor.abstract", "Executor.add_lora", ("lora_request",)),
                _wrapped_by("engine.loading:add_lora"),
            ),
            Patch(
                "request-alone-fails",
                Need(_CORE, "EngineCore.add_request", ("request",)),
                _wrapped_by("engine.requests:add_request"),
            ),
            Patch(
                "look-before-step",
                Need(_CORE, "EngineCore.step"),
                _wrapped_by("engine.requests:step"),
            ),
            Patch(
                "look-before-step-with-batch-queue",
                Need(_CORE, "EngineCore.step_with_batch_queue"),
                _wrapped_by("engine.requests:step"),
            ),
            Patch(
                "removed-adapters",
                Need("vllm.v1.executor.abstract", "Executor.remove_lora", ("lora_id",)),
                _wrapped_by("engine.loading:remove_lora"),
            ),
            Patch(
                "calls-of-workers",
                Need(_CORE, "EngineCore.collective_rpc", ("method", "args")),
                _wrapped_by("engine.requests:collective_rpc"),
            ),
            Patch(
                "same-plugin-on-all-ranks",
                Need(_CORE, "EngineCore._initialize_kv_caches", ("vllm_config",)),
                _wrapped_by("engine.agreement:initialize_kv_caches"),
            ),
        ),
        ("stale-replies", "request-ends-engine"),
    ),
    # In the engine core: other weights under the same name have other keys in the prefix cache.
    Group(
        "vllm.v1.core.kv_cache_utils",
        (
            Patch(
                "prefix-cache-keys",
                Need("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",)),
                _wrapped_by("engine.prefix_cache:add_label"),
            ),
        ),
        ("stale-prefix-cache",),
    ),
    # In the process that calls an engine: a failed request raises an error with the reason.
    Group(
        "vllm.v1.engine.output_processor",
        (
            Patch(
                "errors-of-requests",
                Need(
                    "vllm.v1.engine.output_processor",
                    "OutputProcessor.process_outputs",
                    ("engine_core_outputs",),
                ),
                _wrapped_by("engine.clients:process_outputs"),
            ),
        ),
        ("request-ends-engine",),
    ),
    Group(
        "vllm.v1.engine.llm_engine",
        (
            Patch(
                "refused-on-arrival",
                Need("vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("request_id",)),
                _wrapped_by("engine.clients:forget_refused"),
            ),
            Patch(
                "refused-before-step",
                Need("vllm.v1.engine.llm_engine", "LLMEngine.step"),
                _wrapped_by("engine.clients:forget_refused"),
            ),
        ),
        ("request-ends-engine",),
    ),
    Group(
        "vllm.entrypoints.llm",
        (
            Patch(
                "others-of-a-failed-call",
                Need("vllm.entrypoints.llm", "LLM._run_engine"),
                _wrapped_by("engine.clients:run_engine"),
            ),
        ),
        ("request-ends-engine",),
    ),
    # In the API server.
    Group(
        _SERVING,
        (
            Patch(
                "same-adapter-on-all-engines",
                Need(_SERVING, "OpenAIServingModels.load_lora_adapter", ("request",)),
                _wrapped_by("engine.server:load_lora_adapter"),
            ),
        ),
        ("reloaded-every-step", "replaced-on-some-engines"),
    ),
)


def is_needed(group: Group, version: str) -> bool:
    """Return whether ``version`` of vLLM has a defect that ``group`` fixes."""
    return any(defects.find(name).affects(version) for name in group.defects)


def is_switched_on(group: Group) -> bool:
    """Return whether the environment leaves ``group`` on.

    Raises:
        ValueError: the value of its variable is invalid.
    """
    return not group.switch or settings.is_on(group.switch)
