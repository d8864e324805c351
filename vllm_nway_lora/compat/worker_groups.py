# SPDX-License-Identifier: Apache-2.0
"""The patches in the workers, in model classes and in ``ModelConfig``."""

from __future__ import annotations

from vllm_nway_lora import settings
from vllm_nway_lora.compat.patching import Group, Need, Patch
from vllm_nway_lora.compat.replacements import load, wrapped_by

_COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
_MODELS = "vllm.model_executor.models"
_RUNNER = "vllm.v1.worker.lora_model_runner_mixin"
_FROM_LAYER = ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config")

GROUPS = (
    # In the workers: exact layers, and whole adapters only.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "lora-layer-class",
                Need("vllm.lora.utils", "from_layer", _FROM_LAYER),
                wrapped_by("layers.classes:build_layer"),
            ),
            Patch(
                "lora-layer-class-of-models",
                Need("vllm.lora.model_manager", "from_layer", _FROM_LAYER),
                wrapped_by("layers.classes:build_layer"),
            ),
            Patch(
                "packed-modules-mapping",
                Need("vllm.lora.model_manager", "process_packed_modules_mapping", ("model",)),
                wrapped_by("models.prepare:prepare_and_map"),
            ),
            Patch(
                "layers-of-two-names",
                Need("vllm.lora.model_manager", "LoRAModelManager._create_lora_modules"),
                wrapped_by("layers.aliases:create_lora_modules"),
            ),
            Patch(
                "admission",
                Need("vllm.lora.worker_manager", "WorkerLoRAManager.__init__"),
                wrapped_by("adapters.hooks:guard_loading"),
            ),
            Patch(
                "resident-adapters-first",
                Need(
                    "vllm.lora.worker_manager",
                    "LRUCacheWorkerLoRAManager._apply_adapters",
                    ("lora_requests",),
                ),
                wrapped_by("adapters.hooks:apply_adapters"),
            ),
            Patch(
                "admission-from-memory",
                Need("vllm.lora.model_manager", "LoRAModelManager._add_adapter", ("lora",)),
                wrapped_by("adapters.hooks:add_adapter"),
            ),
            Patch(
                "failed-activation",
                Need("vllm.lora.model_manager", "LoRAModelManager.activate_adapter", ("lora_id",)),
                wrapped_by("adapters.hooks:activate_adapter"),
            ),
            Patch(
                "failed-eviction",
                Need(
                    "vllm.lora.model_manager",
                    "LRUCacheLoRAModelManager.activate_adapter",
                    ("lora_id",),
                ),
                wrapped_by("adapters.hooks:activate_adapter"),
            ),
            Patch(
                "adapter-tensors",
                Need(
                    "vllm.lora.lora_model",
                    "LoRAModel.from_lora_tensors",
                    ("tensors", "peft_helper", "weights_mapper"),
                ),
                wrapped_by("adapters.tensors:validate_tensors"),
            ),
            Patch(
                "adapter-files",
                Need(
                    "vllm.lora.lora_model",
                    "LoRAModel.from_local_checkpoint",
                    ("lora_dir", "expected_lora_modules", "peft_helper"),
                ),
                wrapped_by("adapters.files:load_checkpoint"),
            ),
            Patch(
                "adapter-config",
                Need("vllm.lora.peft_helper", "PEFTHelper.from_dict", ("config_dict",)),
                wrapped_by("adapters.config:validate_config"),
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
            "evicted-by-its-own-step",
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
    # LoRA on model classes that lack nothing but vLLM's flags for it.
    Group(
        _RUNNER,
        (
            Patch(
                "lora-flags",
                Need(_RUNNER, "LoRAModelRunnerMixin.load_lora_model", ("model", "vllm_config")),
                wrapped_by("models.switched_on:load_lora_model"),
            ),
        ),
        ("no-lora-flags",),
    ),
    Group(
        "vllm.config.model",
        (
            Patch(
                "lora-flags-of-configurations",
                Need("vllm.config.model", "ModelConfig.is_lora_supported"),
                lambda original: load("models.without_lora:is_lora_supported")(original),
            ),
        ),
        ("no-lora-flags-in-configuration",),
    ),
    *(
        Group(
            f"{_MODELS}.{file}",
            (
                Patch(
                    f"constructor-of-{file}",
                    Need(f"{_MODELS}.{file}", f"{name}.__init__", ("vllm_config",)),
                    wrapped_by("models.switched_on:build_without_lora"),
                ),
            ),
            ("lora-asserted-off",),
        )
        for file, name in (("mamba2", "Mamba2ForCausalLM"), ("zamba2", "Zamba2ForCausalLM"))
    ),
    # In the workers, on CPU: all tokens of an adapter are multiplied at once, in every LoRA layer.
    Group(
        "vllm.lora.worker_manager",
        (
            Patch(
                "products-on-cpu",
                Need("vllm.lora.model_manager", "get_punica_wrapper"),
                wrapped_by("layers.punica:get_punica_wrapper"),
            ),
        ),
        ("copied-per-token", "last-slot-on-cpu"),
        switch=settings.CPU_VARIABLE,
    ),
)
