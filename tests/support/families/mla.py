"""Families with multi-head latent attention: its down-projections, and the sparse attention's indexer.

Both layers are replicated on every rank (``disable_tp``). The layers can be found at two paths, below
the attention wrapper and below its parent. The tables have the wrapper's path, which the forward uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from support.families.family import (
    ALWAYS_EXACT,
    COMMON,
    LAYER,
    NO_ATTENTION,
    REFUSED,
    VLLM,
    Family,
    Fused,
)
from vllm_nway_lora.diagnosis.report import Outcome

_ATTENTION = f"{LAYER}.self_attn"
MLA: Mapping[str, Any] = {
    **COMMON,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def down_projection(
    attention: str = _ATTENTION,
    stock: tuple[Outcome, Outcome, Outcome, Outcome] = ALWAYS_EXACT,
    wrapper: str = ".mla_attn",
) -> Fused:
    return Fused(
        f"{attention}{wrapper}.fused_qkv_a_proj",
        {f"{attention}.q_a_proj": 24, f"{attention}.kv_a_proj_with_mqa": 48},
        stock,
    )


def _indexer(stock: tuple[Outcome, Outcome, Outcome, Outcome]) -> Fused:
    indexer = f"{_ATTENTION}.indexer"
    return Fused(
        f"{indexer}.wk_weights_proj",
        {f"{indexer}.wk": 32, f"{indexer}.weights_proj": 8},
        stock,
    )


def _build_no_attention(layer: nn.Module, *_: Any, **__: Any) -> None:
    """Replace an attention's ``__init__``; a subclass then builds only its projections."""
    nn.Module.__init__(layer)
    layer.use_pcp, layer.kv_cache_dtype = False, "auto"


_DEEPSEEK_V32 = "vllm.models.deepseek_v32.attention"
_INDEXER = {"index_topk": 8, "index_n_heads": 8, "index_head_dim": 32}
#: The attention itself, which has no LoRA; its CPU kernel has no sparse variant.
MLA_STUBS = (f"{VLLM}.layers.mla.MLAAttention",)

_LONGCAT = Family(
    "LongCat-Flash",
    {
        **MLA,
        "model_type": "longcat_flash",
        "architectures": ["LongcatFlashForCausalLM"],
        "num_hidden_layers": 2,  # vLLM counts each of its layers as two
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "mla_scale_q_lora": False,
        "mla_scale_kv_lora": False,
        "zero_expert_num": 0,
    },
    tuple(down_projection(f"{_ATTENTION}.{n}", (REFUSED,) * 4) for n in (0, 1)),
    stubs=(*MLA_STUBS, f"{VLLM}.models.longcat_flash.LongcatMoe"),
)

MLA_FAMILIES = (
    Family(
        "DeepSeek-V3, Kimi-K2, Mistral Large 3",
        {**MLA, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
        (down_projection(),),
        stubs=MLA_STUBS,
    ),
    Family(
        "DeepSeek-V3.2",
        {
            **MLA,
            **_INDEXER,
            "model_type": "deepseek_v32",
            "architectures": ["DeepseekV32ForCausalLM"],
        },
        (down_projection(), _indexer((REFUSED,) * 4)),
        stubs=MLA_STUBS,
        since="0.20.0",  # before, the indexer had two layers
    ),
    Family(
        "DeepSeek-V3.2, GLM-5, the class for GPUs",
        {
            **MLA,
            **_INDEXER,
            "model_type": "deepseek_v32",
            "architectures": ["DeepseekV32ForCausalLM"],
        },
        (down_projection(wrapper=""), _indexer((REFUSED,) * 4)),
        stubs=(
            f"{_DEEPSEEK_V32}.SparseAttnIndexer",
            f"{_DEEPSEEK_V32}.MLAAttention.process_weights_after_loading",
        ),
        replaced={f"{_DEEPSEEK_V32}.MLAAttention.__init__": _build_no_attention},
        classes={
            "DeepseekV32ForCausalLM": "vllm.models.deepseek_v32.nvidia.model:DeepseekV32ForCausalLM"
        },
        since="0.33.0",
    ),
    Family(
        "Transformers backend, MLA",
        {**MLA, "model_type": "deepseek_v3", "architectures": ["TransformersForCausalLM"]},
        (down_projection(wrapper=""),),
        stubs=NO_ATTENTION,
        since="0.32.0",
    ),
    Family(
        "GLM-4-MoE-Lite",
        {**MLA, "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]},
        (down_projection(),),
        stubs=(
            *MLA_STUBS,
            f"{VLLM}.models.glm4_moe_lite.Glm4MoeLiteForCausalLM.set_moe_parameters",
        ),
        since="0.20.0",  # before, transformers did not have it
    ),
    Family(
        "A.X K1",
        # Its configuration's class differs between releases of transformers.
        {
            **MLA,
            "model_type": "deepseek_v3",
            "architectures": ["AXK1ForCausalLM"],
            "num_nextn_predict_layers": 0,
            "moe_layer_freq": 1,
        },
        (down_projection(),),
        stubs=MLA_STUBS,
    ),
    Family(
        "openPangu Ultra",
        # transformers has no class for its configuration; DeepSeek's has the same fields. This is the
        # dense one of two model classes, which share everything tested here (OpenPanguModelBase).
        {**MLA, "model_type": "deepseek_v3", "architectures": ["PanguEmbeddedForCausalLM"]},
        (down_projection(),),
        stubs=MLA_STUBS,
    ),
    Family(
        "HY-V4",
        {
            **MLA,
            **_INDEXER,
            "model_type": "hy_v4",
            "architectures": ["HYV4ForCausalLM"],
            "mlp_layer_types": ["dense"],
            "layer_types": ["deepseek_sparse_attention"],
            "indexer_types": ["full"],
        },
        (down_projection(wrapper=""), _indexer(ALWAYS_EXACT)),
        stubs=tuple(
            f"vllm.models.hy_v4.nvidia.attention.{name}"
            for name in (
                "MLAAttention",
                "SparseAttnIndexer",
                "get_attn_backend",
                "HYV4MLAAttention._resolve_sink_backend",
            )
        ),
        since="0.32.0",
    ),
    _LONGCAT,
    # Its n-gram embeddings are left out here: they need vLLM's V2 model runner, which needs a GPU.
    dataclasses.replace(
        _LONGCAT,
        name="LongCat-Flash, n-gram embeddings",
        config={**_LONGCAT.config, "architectures": ["LongcatFlashNgramForCausalLM"]},
        stubs=(*_LONGCAT.stubs, ("vllm.config.vllm.VllmConfig.use_v2_model_runner", True)),
        since="0.33.0",
    ),
)
