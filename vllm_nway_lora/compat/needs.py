# SPDX-License-Identifier: Apache-2.0
"""The attributes of vLLM that this package uses, beside the targets of its patches.

``tests/compat/test_needs.py`` compares this table with the package's own sources. An untested release
that lacks one of them is left unchanged (:mod:`vllm_nway_lora.compat.registration`).
"""

from __future__ import annotations

from vllm_nway_lora.compat.patching import Need

_LORA = "vllm.lora"
_LAYERS = "vllm.lora.layers"
_LINEAR = "vllm.model_executor.layers.linear"
_ENGINE = "vllm.v1.engine"
_MLA = "vllm.model_executor.layers.attention.mla_attention"


def _of(module: str, owner: str, *attributes: str) -> tuple[Need, ...]:
    """Return the needs of a class of ``module``, or of the module itself if ``owner`` is empty."""
    return tuple(Need(module, f"{owner}.{name}" if owner else name) for name in attributes)


NEEDS = (
    # Adapters, and the manager of a worker's layers and slots.
    *_of(
        f"{_LORA}.worker_manager",
        "WorkerLoRAManager",
        *("_adapter_manager", "_load_adapter", "list_adapters", "remove_adapter"),
    ),
    *_of(
        f"{_LORA}.model_manager",
        "LoRAModelManager",
        *("_get_lora_layer_weights", "_get_punica_wrapper", "_is_non_gated_moe", "_last_mapping"),
        *("list_adapters", "lora_config", "lora_index_to_id", "lora_slots", "model", "modules"),
        *("packed_modules", "packed_modules_mapping", "remove_adapter", "supports_mm"),
    ),
    *_of(f"{_LORA}.lora_model", "LoRAModel", "id", "loras", "rank"),
    *_of(
        f"{_LORA}.lora_weights",
        "LoRALayerWeights",
        *("lora_a", "lora_alpha", "lora_b", "rank", "scaling"),
    ),
    *_of(f"{_LORA}.peft_helper", "PEFTHelper", "modules_to_save"),
    *_of(
        f"{_LORA}.request",
        "LoRARequest",
        *("load_inplace", "lora_int_id", "lora_name", "lora_path"),
    ),
    *_of(f"{_LORA}.utils", "", "get_lora_id", "parse_fine_tuned_lora_name"),
    *_of(
        "vllm.config.lora",
        "LoRAConfig",
        *("fully_sharded_loras", "lora_dtype", "max_cpu_loras", "max_lora_rank", "max_loras"),
    ),
    # LoRA layers.
    *_of(f"{_LAYERS}.base", "BaseLayerWithLoRA", "can_replace_layer", "create_lora_weights"),
    *_of(
        f"{_LAYERS}.base_linear",
        "BaseLinearLayerWithLoRA",
        *("base_layer", "device", "input_size", "lora_a_stacked", "lora_b_stacked"),
        *("output_slices", "punica_wrapper", "reset_lora", "set_lora", "set_mapping"),
        *("slice_lora_a", "slice_lora_b", "tp_rank", "tp_size"),
    ),
    *_of(f"{_LAYERS}.column_parallel_linear", "ColumnParallelLinearWithLoRA", "n_slices"),
    *_of(
        f"{_LAYERS}.fused_moe",
        "FusedMoEWithLoRA",
        *("_slice_w13_b", "_slice_w2_a", "fully_sharded"),
        *("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked"),
    ),
    *_of(f"{_LAYERS}.fused_moe", "FusedMoE3DWithLoRA", "_base_model"),
    *_of(f"{_LAYERS}.logits_processor", "LogitsProcessorWithLoRA", "base_layer", "hidden_size"),
    *_of(
        _LAYERS,
        "",
        *("FusedMoE3DWithLoRA", "FusedMoEWithLoRA", "LogitsProcessorWithLoRA"),
        *("MergedColumnParallelLinearWithLoRA", "RowParallelLinearWithLoRA"),
        "VocabParallelEmbeddingWithLoRA",
    ),
    # Base layers and their weight loaders.
    *_of(_LINEAR, "LinearBase", "input_size", "output_size", "prefix", "tp_rank", "tp_size"),
    *_of(_LINEAR, "ColumnParallelLinear", "output_size_per_partition", "weight_loader"),
    *_of(_LINEAR, "MergedColumnParallelLinear", "output_sizes"),
    *_of(_LINEAR, "RowParallelLinear", "input_size_per_partition"),
    *_of(
        _LINEAR,
        "QKVParallelLinear",
        *("head_size", "total_num_heads", "total_num_kv_heads", "v_head_size", "weight_loader"),
    ),
    *_of("vllm.model_executor.parameter", "_ColumnvLLMParameter", "output_dim"),
    *_of("vllm.model_executor.parameter", "RowvLLMParameter", "input_dim"),
    *_of(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        *("embedding_dim", "org_vocab_size", "shard_indices"),
    ),
    *_of(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbeddingShardIndices",
        *("org_vocab_end_index", "org_vocab_start_index"),
    ),
    *_of(
        "vllm.model_executor.layers.fused_moe.config",
        "FusedMoEConfig",
        *("intermediate_size_per_partition", "moe_parallel_config"),
    ),
    *_of("vllm.model_executor.layers.vocab_parallel_embedding", "", "ParallelLMHead"),
    *_of("vllm.model_executor.layers.logits_processor", "LogitsProcessor", "vocab_size"),
    *_of("vllm.model_executor.custom_op", "", "op_registry_oot"),
    *_of(
        "vllm.model_executor.models.utils",
        "WeightsMapper",
        *("__or__", "_map_name", "orig_to_new_prefix", "orig_to_new_substr"),
    ),
    # MLA attention, which reads the weight of a layer.
    *_of(
        _MLA,
        "MLAAttention",
        *("_v_up_proj", "forward_impl", "impl", "kv_b_proj", "kv_cache_dtype", "kv_lora_rank"),
        *("layer_name", "num_heads", "qk_nope_head_dim", "use_sparse", "v_head_dim"),
    ),
    *_of(
        _MLA,
        "MLACommonImpl",
        *("_compute_prefill_context", "dcp_world_size", "forward_mha", "forward_mqa", "kv_b_proj"),
    ),
    *_of(_MLA, "MLACommonMetadata", "num_actual_tokens", "num_decode_tokens", "prefill"),
    *_of(_MLA, "MLACommonPrefillMetadata", "chunked_context", "query_start_loc"),
    # LoRA on classes without its flags.
    *_of("vllm.model_executor.models.interfaces", "", "SupportsLoRA", "supports_multimodal"),
    *_of("vllm.model_executor.models.interfaces", "SupportsMultiModal", "get_language_model"),
    *_of(
        "vllm.model_executor.models.module_mapping",
        "MultiModelKeys",
        *("connector", "from_string_field", "tower_model"),
    ),
    *_of("vllm.forward_context", "", "get_forward_context"),
    *_of("vllm.forward_context", "ForwardContext", "attn_metadata"),
    *_of("vllm.config", "VllmConfig", "cache_config"),
    *_of("vllm.config.cache", "CacheConfig", "kv_sharing_fast_prefill"),
    *_of("vllm.config.lora", "LoRAConfig", "enable_tower_connector_lora"),
    *_of("vllm.config.model", "ModelConfig", "architecture", "convert_type", "registry"),
    *_of("vllm.model_executor.models.registry", "_ModelRegistry", "models"),
    *_of(
        "vllm.model_executor.models.registry", "_LazyRegisteredModel", "class_name", "module_name"
    ),
    *_of("vllm.model_executor.models.registry", "_RegisteredModel", "model_cls"),
    # The twin of a model.
    *_of("vllm.model_executor.model_loader.utils", "", "initialize_model"),
    *_of("vllm.model_executor.layers.rotary_embedding", "", "_ROPE_DICT"),
    *_of(
        "vllm.config.compilation",
        "CompilationConfig",
        *("cudagraph_mode", "mode", "static_all_moe_layers", "static_forward_context"),
    ),
    *_of("vllm.config.compilation", "CUDAGraphMode", "has_full_cudagraphs"),
    *_of("vllm.config.model", "ModelConfig", "enforce_eager", "hf_config", "hf_text_config"),
    *_of("vllm.distributed", "", "get_tensor_model_parallel_world_size"),
    *_of("vllm.distributed.utils", "", "divide"),
    *_of("vllm.config", "", "get_current_vllm_config_or_none", "set_current_vllm_config"),
    *_of(
        "vllm.config",
        "VllmConfig",
        *("compilation_config", "lora_config", "model_config", "parallel_config", "quant_config"),
    ),
    *_of("vllm.envs", "", "environment_variables"),
    *_of("vllm.platforms", "", "current_platform"),
    *_of("vllm.platforms.interface", "Platform", "is_cpu", "is_cuda", "is_cuda_alike"),
    *_of("vllm.platforms.interface", "Platform", "device_name", "is_rocm", "is_tpu"),
    # The engine core, its workers and its callers.
    *_of(f"{_ENGINE}.core", "EngineCore", "abort_requests", "model_executor", "scheduler"),
    *_of(f"{_ENGINE}.core", "EngineCore", "request_block_hasher", "vllm_config"),
    *_of(f"{_ENGINE}.core", "EngineCoreProc", "output_queue"),
    *_of(
        _ENGINE,
        "EngineCoreOutput",
        *("finish_reason", "new_token_ids", "request_id", "stop_reason"),
    ),
    *_of(_ENGINE, "EngineCoreOutputs", "finished_requests", "outputs"),
    *_of(_ENGINE, "FinishReason", "ERROR"),
    *_of(f"{_ENGINE}.async_llm", "", "InputStreamError"),
    *_of(f"{_ENGINE}.llm_engine", "LLMEngine", "abort_request", "output_processor"),
    *_of(f"{_ENGINE}.output_processor", "OutputProcessor", "abort_requests", "request_states"),
    *_of(f"{_ENGINE}.output_processor", "RequestState", "queue"),
    *_of(f"{_ENGINE}.output_processor", "RequestOutputCollector", "put"),
    *_of("vllm.entrypoints.llm", "LLM", "llm_engine"),
    *_of(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        *("lora_config", "max_num_running_reqs", "running", "schedule", "waiting"),
    ),
    *_of("vllm.v1.core.sched.request_queue", "RequestQueue", "prepend_request", "remove_requests"),
    *_of(
        "vllm.v1.request",
        "Request",
        *("block_hashes", "client_index", "lora_request", "request_id", "status"),
    ),
    *_of("vllm.v1.executor.abstract", "Executor", "collective_rpc", "shutdown", "vllm_config"),
    *_of("vllm.v1.worker.gpu_worker", "Worker", "add_lora", "model_runner"),
    *_of("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin", "lora_manager"),
    # The API server.
    *_of(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        *("engine_client", "lora_requests"),
    ),
    *_of(f"{_ENGINE}.async_llm", "AsyncLLM", "add_lora", "remove_lora", "vllm_config"),
    *_of("vllm.config.parallel", "ParallelConfig", "data_parallel_size", "enable_dbo"),
)

#: Attributes that older releases lack, and without which the package goes on as for these releases.
#: A release after the newest known one must have them: there, a missing one has another name.
RECENT = (
    *_of(
        f"{_LORA}.model_manager",
        "LoRAModelManager",
        *("_enable_mixed_moe_lora_format", "_enable_moe_shared_loras"),
        "_restrict_to_local_experts",
    ),
    *_of(f"{_LORA}.lora_model", "LoRAModel", "is_3d_lora_weight"),
    *_of(f"{_LORA}.lora_model", "", "_is_remote_expert_key"),
    *_of(f"{_LORA}.peft_helper", "PEFTHelper", "rank_pattern"),
    *_of(
        f"{_LAYERS}.fused_moe",
        "FusedMoEWithLoRA",
        *("_tp_shard_size", "ep_rank", "global_num_experts", "use_ep"),
    ),
    *_of(
        "vllm.model_executor.layers.fused_moe.config",
        "FusedMoEConfig",
        *("hidden_dim_unpadded", "intermediate_size_per_partition_unpadded"),
    ),
    *_of("vllm.config.lora", "LoRAConfig", "target_modules"),
    *_of("vllm.v1.core.sched.scheduler", "Scheduler", "kv_holding_waiting"),
)

_STEP5 = "vllm.models.step5.nvidia.model"

#: Attributes of classes and modules that a release can lack: needed where the class or module exists.
OF_OPTIONAL_OWNERS = (
    *_of(
        f"{_LORA}.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU",
        *("add_expand", "add_lora_embedding", "add_lora_linear", "add_lora_logits", "add_shrink"),
        *("sampler_indices", "token_lora_indices", "update_metadata"),
    ),
    *_of("vllm.model_executor.models.k2_horizon", "K2HorizonMoVAAttention", "v_experts"),
    *_of(
        "vllm.models.muse_spark.common.layers",
        "MuseSpark1xQKVOGateParallelLinear",
        *("head_size", "num_heads", "num_kv_heads", "tp_size"),
    ),
    *_of(
        _STEP5,
        "Step5FusedQKVIndexerLinear",
        *("head_size", "index_kv_head_replicas", "input_size", "local_gate_size"),
        *("local_index_k_size", "proxy_dim", "total_num_heads", "total_num_kv_heads", "tp_size"),
    ),
    *_of(_STEP5, "Step5SparseIndexerIndexTPLinear", "input_size", "output_size"),
    *_of(
        "vllm.model_executor.models.lfm2_vl",
        "Lfm2VLForConditionalGeneration",
        *("hf_to_vllm_mapper", "packed_modules_mapping"),
    ),
    *_of(
        "vllm.models.glm5next.common.attention", "Indexer", "head_dim", "n_head", "wk_weights_proj"
    ),
)

#: As above, and as in ``RECENT``: 0.30.0 has the class without its kernel, and so without the flag.
RECENT_OF_OPTIONAL_OWNERS = _of(
    "vllm.models.qwen4_exp.nvidia.hyperconnection", "GatedResidual", "_use_hc_down_silu"
)
