# SPDX-License-Identifier: Apache-2.0
"""The patches in the engine core, in its callers and in the API server."""

from __future__ import annotations

from vllm_nway_lora.compat.patching import Group, Need, Patch
from vllm_nway_lora.compat.replacements import wrapped_by

_SERVING = "vllm.entrypoints.openai.models.serving"
_CORE = "vllm.v1.engine.core"

GROUPS = (
    # In the engine core: an adapter is loaded by all ranks or by none, and its failure does not
    # end the engine.
    Group(
        _CORE,
        (
            Patch(
                "all-ranks-or-none",
                Need("vllm.v1.executor.abstract", "Executor.add_lora", ("lora_request",)),
                wrapped_by("engine.loading:add_lora"),
            ),
            Patch(
                "request-alone-fails",
                Need(_CORE, "EngineCore.add_request", ("request",)),
                wrapped_by("engine.requests:add_request"),
            ),
            Patch(
                "look-before-step",
                Need(_CORE, "EngineCore.step"),
                wrapped_by("engine.requests:step"),
            ),
            Patch(
                "look-before-step-with-batch-queue",
                Need(_CORE, "EngineCore.step_with_batch_queue"),
                wrapped_by("engine.requests:step"),
            ),
            Patch(
                "removed-adapters",
                Need("vllm.v1.executor.abstract", "Executor.remove_lora", ("lora_id",)),
                wrapped_by("engine.loading:remove_lora"),
            ),
            Patch(
                "calls-of-workers",
                Need(_CORE, "EngineCore.collective_rpc", ("method", "args")),
                wrapped_by("engine.requests:collective_rpc"),
            ),
            Patch(
                "same-plugin-on-all-ranks",
                Need(_CORE, "EngineCore._initialize_kv_caches", ("vllm_config",)),
                wrapped_by("engine.agreement:initialize_kv_caches"),
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
                wrapped_by("engine.prefix_cache:add_label"),
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
                wrapped_by("engine.clients:process_outputs"),
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
                wrapped_by("engine.clients:forget_refused"),
            ),
            Patch(
                "refused-before-step",
                Need("vllm.v1.engine.llm_engine", "LLMEngine.step"),
                wrapped_by("engine.clients:forget_refused"),
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
                wrapped_by("engine.clients:run_engine"),
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
                wrapped_by("engine.server:load_lora_adapter"),
            ),
        ),
        ("reloaded-every-step", "replaced-on-some-engines"),
    ),
)
