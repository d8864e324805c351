"""Fields that vLLM's model classes read and that a configuration may lack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from support.families.family import HIDDEN

#: Fields that vLLM's classes read and configuration classes lack, with values that are usual.
_USUAL: Mapping[str, Any] = {
    "activation_function": "silu",
    "additional_vocab_size": 0,
    "apply_vit_abs_pos_embed": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_logit_softcapping": None,
    "block_dim": HIDDEN,
    "bos_token_id": 0,
    "conv_dim": HIDDEN,
    "decoder_sparse_step": 1,
    "dim_model_base": 256,
    "downsample_factor": 4,
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
    "embed_dim": 1280,
    "embedding_dropout": 0.0,
    "embedding_size": 128,
    "eos_token_id": 1,
    "expert_hidden_dim": 64,
    "ffn_hidden_act": "silu",
    "ffn_hidden_size": 64,
    "final_logit_softcapping": None,
    "first_k_dense_replace": 1,
    "force_image_size": 448,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "image_size": 448,
    "image_tag_type": "internvl",
    "image_token_id": 5,
    "input_mult": 1.0,
    "interleaved_sliding_window": 16,
    "layer_norm_eps": 1e-06,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_rms_epsilon": 1e-5,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "max_dynamic_patch": 1,
    "max_seq_length": 128,
    "max_window_layers": 4,
    "min_dynamic_patch": 1,
    "mlp_only_layers": [],
    "mlp_ratio": 4,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": 64,
    "multimodal_projector_bias": False,
    "mup_cfg": None,
    "mup_scale_factor": 1.0,
    "n_group": 1,
    "n_head": 8,
    "n_layer": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_after": False,
    "norm_after_layer": False,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_dense_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_expert": 1,
    "num_shared_experts": 1,
    "output_mult": 1.0,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "patch_size": 14,
    "pixel_hidden_size": 1280,
    "position_embedding_type": "absolute",
    "projector_bias": True,
    "projector_hidden_act": "gelu",
    "ps_version": "v2",
    "qkv_bias": False,
    "query_pre_attn_scalar": 16,
    "rope_local_theta": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1e4,
    "rotary_dim": 64,
    "route_norm": True,
    "route_scale": 1.0,
    "routed_scaling_factor": 1.0,
    "scale_depth": 1.4,
    "scale_emb": 1,
    "score_func": "sigmoid",
    "score_function": "sigmoid",
    "scoring_func": "sigmoid",
    "select_layer": -1,
    "shared_expert_intermediate_size": 64,
    "sliding_window": None,
    "sliding_window_pattern": 4,
    "spatial_merge_size": 2,
    "template": "",
    "temporal_patch_size": 2,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "type_vocab_size": 2,
    "use_bias": False,
    "use_cla": False,
    "use_expert_bias": False,
    "use_mup": False,
    "use_qk_norm": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "use_thumbnail": False,
    "vision_feature_layer": -1,
    "vocab_size": 128,
    "window_size": None,
    "window_sizes": None,
}


def complete(config: Mapping[str, Any], error: BaseException) -> dict[str, Any] | None:
    """Return a configuration with the field that an error misses; None if that is unknown or is there."""
    missing = re.search(r"'\w*Config' object has no attribute '(\w+)'", str(error))
    name = missing[1] if missing else ""
    return _add(config, name) if name in _USUAL and name not in config else None


def _add(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Add a field to a configuration and to those in it, where they lack it."""
    return {name: _USUAL[name]} | {
        key: _add(value, name) if key.endswith("config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
