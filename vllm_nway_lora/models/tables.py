# SPDX-License-Identifier: Apache-2.0
"""Known fusions by name: facts that vLLM's model classes do not state, or state incorrectly.

Data only. Add a family here only if its class leaves something out; add it to
``tests/support/families`` in any case. Each entry names its source: a file of vLLM 0.33.0 below
``vllm/``, unless the entry names another release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: Fused projection -> {module: indices of the outputs that it covers}. Needed only where a projection
#: has more outputs than modules and more than one module. With as many modules as outputs, each
#: module covers one output; a single module covers all. Names identify the modules because row
#: counts cannot: in Qwen3.5, ``v`` and ``z`` have the same number of rows.
OUTPUTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    # Qwen3.5, Qwen3.5-MoE and the models that share their gated-delta-net layer: outputs q, k, v, z.
    # Source: the shard ids in model_executor/models/qwen3_5.py, 0.17.0 (load_weights) to 0.32.0
    # (hf_to_vllm_mapper).
    "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,)},
}

#: (module, number of its outputs) -> the names that trainers give to modules of one output each, where
#: they do not follow from the module's name; empty for an output without a name.
PARTS: Mapping[tuple[str, int], tuple[str, ...]] = {
    # Mamba2: outputs z, x, B, C, dt. Names of Tinker's archives for Nemotron-H (thinking-machines-lab/
    # tinker-cookbook, weights/_adapter.py, 9dfcc3a).
    ("in_proj", 5): ("gate_proj", "x_proj", "", "", ""),
}

#: Modules of fused projections that some model classes omit from ``packed_modules_mapping``.
UNLISTED: Mapping[str, tuple[str, ...]] = {
    # GLM-5-Next's KDA (models/glm5next/common/model.py, load_weights; vllm-project/vllm#56327).
    "in_proj_qkvbfg_a": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"),
    # LongCat-Flash and GLM-5-Next (model_executor/models/longcat_flash.py,
    # models/glm5next/common/attention.py). DeepSeek's own class lists it.
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    # The sparse-attention indexer of DeepSeek-V3.2 and GLM-5-Next (model_executor/models/
    # deepseek_v2.py, load_weights). HY-V4 lists it.
    "wk_weights_proj": ("wk", "weights_proj"),
    # GraniteMoeShared's shared MLP, one module in a checkpoint too (model_executor/models/
    # granitemoeshared.py). GraniteMoeHybrid lists it.
    "input_linear": ("input_linear",),
}

#: Entries of ``packed_modules_mapping`` for layers that do not support LoRA. vLLM's warm-up fails on
#: them (AliceAI: model_executor/models/alice_ai.py; the convolution kernel reads its weight directly).
UNUSABLE: Mapping[str, frozenset[str]] = {
    "conv1d": frozenset({"q_conv1d", "k_conv1d", "v_conv1d"}),
}

#: Entries of ``packed_modules_mapping`` that name other modules than a checkpoint has: fused
#: projection -> (declared modules, actual modules).
MISNAMED: Mapping[str, tuple[list[str], list[str]]] = {
    # model_executor/models/bamba.py until 0.23.0: its load_weights loads gate and up.
    "gate_up_proj": (["up_proj", "down_proj"], ["gate_proj", "up_proj"]),
    # A workaround for "fewer-modules-than-outputs" that users and frameworks apply to Qwen3.5's class
    # (vllm-project/vllm#36372). PEFT's adapters have the modules of the checkpoint.
    "in_proj_qkvz": (
        ["in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"],
        ["in_proj_qkv", "in_proj_z"],
    ),
}

#: Model class -> parts of module names that it renames only when it loads weights. The names in
#: adapters therefore match no module.
RENAMES: Mapping[str, Mapping[str, str]] = {
    # model_executor/models/lfm2_vl.py; the text model renames in lfm2.py, load_weights.
    "Lfm2VLForConditionalGeneration": {".conv.": ".short_conv."},
    # model_executor/models/falcon_h1.py until 0.24.0, load_weights; from 0.25.0 on in its mapper.
    "FalconH1ForCausalLM": {"mamba": "mamba.mamba"},
}

#: Entries of ``packed_modules_mapping`` that stand for padding, and exist only where there is some.
#: Source: models/qwen4_exp/nvidia/model.py; hyperconnection.py pads to a multiple of 16 rows.
PADDING = frozenset({"_input_mix_padding"})

#: Subclasses of ``MergedColumnParallelLinear`` with a forward of their own that computes the same
#: product with another kernel.
SAME_PRODUCT = frozenset(
    {
        # model_executor/models/deepseek_v2.py: a kernel for few tokens. One class has the first name
        # in 0.17.1 and the second in 0.33.0.
        "DeepSeekV2FusedQkvAProj",
        "DeepSeekV2FusedQkvAProjLinear",
    }
)

_CONVOLUTION = "the convolution kernel reads its weight directly and bypasses every LoRA layer"

#: (class of the layer's parent, layer's name) -> module -> the reason why LoRA on it cannot be exact.
#: The class is the end of its full name; empty for any class.
UNSUPPORTED: Mapping[tuple[str, str], Mapping[str, str]] = {
    # model_executor/layers/mamba/mamba_mixer2.py, gdn/*.py and others, models/glm5next/common/kda.py:
    # a `ColumnParallelLinear` that is never called, its weight unsqueezed to three dimensions.
    ("", "conv1d"): {"conv1d": _CONVOLUTION},
    ("", "q_conv1d"): {"q_conv1d": _CONVOLUTION},
    ("", "k_conv1d"): {"k_conv1d": _CONVOLUTION},
    ("", "v_conv1d"): {"v_conv1d": _CONVOLUTION},
    # model_executor/models/iquest_loopcoder.py, LoopGateProjection.forward.
    ("LoopGateProjection", "gate_proj"): {
        "gate_proj": "its model calls it with one row per head, and LoRA's rows are tokens"
    },
    # models/muse_spark/nvidia/model.py and amd/model.py, fold_router_output_multiplier.
    ("MuseSpark1xMoE", "router"): {"router": "its model folds a factor into the weight"},
}


class Read(NamedTuple):
    """A layer whose weight its parent's class reads directly on some platforms or in some settings.

    Attributes:
        parent: the name of a class of the layer's parent.
        layer: the layer's path below that parent.
        reader: what reads the weight, for messages.
        platform: a method of vLLM's platform that returns True where the read happens; empty for any.
        flag: an attribute of the parent that is None or False where it does not; empty if none is.
    """

    parent: str
    layer: str
    reader: str
    platform: str = ""
    flag: str = ""


#: Reads of a weight that leave no other way: adapters on the layer are refused where they happen.
READS = (
    # models/deepseek_v4/attention.py and deepseek_v41/attention.py, with a subclass per platform (in
    # 0.20.2 model_executor/models/deepseek_v4.py): a product per group of heads.
    Read("DeepseekV4Attention", "wo_a", "DeepSeek-V4's attention"),
    # models/deepseek_v4/amd/rocm.py and deepseek_v41/amd/rocm.py: weights shuffled after loading.
    Read("DeepseekV4Attention", "wo_b", "its kernel on ROCm", "is_rocm", "_wo_b_scale"),
    Read("DeepseekV4Attention", "fused_wqa_wkv", "its kernel on ROCm", "is_rocm", "_wqa_wkv_scale"),
    # models/deepseek_v4/nvidia/model.py, _forward_mega_moe.
    Read("DeepseekV4MoE", "gate", "the MegaMoE kernel", flag="use_native_mega_moe"),
    # models/deepseek_v4/amd/model.py: the weight is shuffled after loading.
    Read("DeepseekV4MLP", "gate_up_proj", "its kernel on ROCm", "is_rocm", "_gateup_scale"),
    # models/hy_v4/nvidia/hc.py and amd/hc.py, forward: `hpc_op`, else a kernel in Triton.
    Read("HYV4HCPreLayer", "hc_fn", "its kernel on GPUs", "is_cuda_alike"),
    Read("HYV4HCHeadLayer", "hc_head_fn", "its kernel on GPUs", "is_cuda_alike"),
    # model_executor/models/alice_ai.py.
    Read("_AttentionResidualFinal", "res_proj", "the kernel of the residuals"),
    Read("AliceAIDecoderBlock", "attn_res_proj", "the kernel of the residuals"),
    Read("AliceAIDecoderBlock", "mlp_res_proj", "the kernel of the residuals"),
    # model_executor/models/gpt_oss.py, MLPBlock.forward.
    Read("MLPBlock", "router", "its kernel on ROCm", "is_rocm"),
    # model_executor/layers/fused_moe/runner/moe_runner.py, _maybe_fuse_gate_weights: a copy of both.
    Read("MoERunner", "gate", "the fused gate of its experts", flag="_fse_fuse_gate"),
    Read("MoERunner", "shared_expert_gate", "the fused gate of its experts", flag="_fse_fuse_gate"),
    # models/muse_spark/nvidia/model.py, _project_local_columns: each rank's part of the weight.
    Read("MuseSpark1xMoE", "pooler", "its sharded product", flag="shard_pooler"),
    Read("MuseSpark1xMoE", "unpooler", "its sharded product", flag="shard_unpooler"),
    # models/deepseek_v4/amd/mono_decode.py, models/deepseek_v41/amd/mono_decode.py.
    *(
        Read("DeepseekV4DecoderLayer", path, "the kernel of a whole layer", "is_rocm", "mono")
        for path in (
            *("attn.fused_wqa_wkv", "attn.wq_b", "attn.wo_b", "ffn.gate"),
            *("ffn.shared_experts.gate_up_proj", "ffn.shared_experts.down_proj"),
        )
    ),
    # models/deepseek_v41/attention.py, bind_gemm_rs.
    Read("DeepseekV4Attention", "wo_b", "the kernel that also reduces its output", flag="gemm_rs"),
    # models/kimi_k3/nvidia/kda.py and mla.py, forward.
    Read("KimiK3DeltaAttention", "in_proj_qkvgfab", "its kernel", flag="_projection_events"),
    Read("KimiK3DeltaAttention", "f_b_proj", "its kernel", flag="_projection_events"),
    Read("MultiHeadLatentAttention", "fused_qkv_a_g_proj", "its kernel", flag="_gate_events"),
    # models/kimi_k3/nvidia/model.py and latent_moe_runner.py, amd/linear.py and latent_moe_runner.py.
    Read("KimiRoutedOutputTransform", "up_proj", "the kernel of the latent experts"),
    Read("KimiDecoderLayer", "self_attention_res_proj", "the kernel of the residuals"),
    Read("KimiDecoderLayer", "mlp_res_proj", "the kernel of the residuals"),
    Read("KimiLinearModel", "output_attn_res_proj", "the kernel of the residuals"),
    # model_executor/layers/mamba/short_conv.py, model_executor/models/lfm2.py.
    Read("ShortConv", "conv", "the convolution kernel"),
    Read("Lfm2BidirectionalShortConv", "conv", "the convolution kernel"),
)

#: Class -> (its attribute for a kernel that reads a layer's weight directly, the value without it).
#: The model then calls the layer instead.
FUSED_KERNEL_FLAGS: Mapping[str, tuple[str, bool | None]] = {
    # models/qwen4_exp/nvidia/hyperconnection.py, _down_and_inject: up to 48 tokens, from SM90 on.
    "GatedResidual": ("_use_hc_down_silu", False),
    # models/hy_v4/nvidia/attention.py, forward: `linear_gate`, with the package `hpc`.
    "HYV4MLAAttention": ("use_hpc_gated_mla", False),
    # models/kimi_k3/nvidia/model.py, mla.py and kda.py: `down_proj` and `o_proj`, reduced in the kernel.
    "KimiMLP": ("gemm_rs_ar", None),
    "MultiHeadLatentAttention": ("gemm_rs_ar", None),
    "KimiK3DeltaAttention": ("gemm_rs_ar", None),
    # models/muse_spark/nvidia/model.py, _project_output: `o_proj`, with sequence parallelism.
    "MuseSpark1xAttention": ("gemm_rs", None),
}


def outputs_by_module(
    fused: str, modules: Sequence[str], n_outputs: int
) -> tuple[tuple[int, ...], ...] | None:
    """Return the output indices of each of ``modules``, or None if they are not known.

    Args:
        fused: the projection's own name, the last part of its path (``in_proj_qkvz``).
        modules: its adapter-visible modules, in the order of ``packed_modules_mapping``.
        n_outputs: the number of its outputs (``len(output_sizes)``).
    """
    if len(modules) == 1:
        return (tuple(range(n_outputs)),)
    if len(modules) == n_outputs:
        return tuple((output,) for output in range(n_outputs))
    known = OUTPUTS.get(fused, {})
    if set(known) != set(modules) or sum(map(len, known.values())) != n_outputs:
        return None
    return tuple(known[module] for module in modules)
