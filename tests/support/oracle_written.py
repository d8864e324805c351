"""Families of the oracle without a class in transformers: the names of their checkpoints' weights."""

from __future__ import annotations

from support.oracle_family import SMALL, Family

_ATTENTION = {
    "q_proj": (128, 128),
    "k_proj": (64, 128),
    "v_proj": (64, 128),
}
LLAMA = {
    "model.embed_tokens.weight": (512, 128),
    "lm_head.weight": (512, 128),
    "model.norm.weight": (128,),
    "model.layers.{}.input_layernorm.weight": (128,),
    "model.layers.{}.post_attention_layernorm.weight": (128,),
    **{f"model.layers.{{}}.self_attn.{n}.weight": shape for n, shape in _ATTENTION.items()},
    "model.layers.{}.self_attn.o_proj.weight": (128, 128),
    "model.layers.{}.mlp.gate_proj.weight": (192, 128),
    "model.layers.{}.mlp.up_proj.weight": (192, 128),
    "model.layers.{}.mlp.down_proj.weight": (128, 192),
}
# Their configuration's classes are in the checkpoints' own code; Llama's has the same fields.
WRITTEN = {**SMALL, "model_type": "llama", "rms_norm_eps": 1e-6}


WRITTEN_FAMILIES = (
    Family(
        "InternLM2",
        {**WRITTEN, "architectures": ["InternLM2ForCausalLM"], "bias": False},
        weights={
            "model.tok_embeddings.weight": (512, 128),
            "output.weight": (512, 128),
            "model.norm.weight": (128,),
            "model.layers.{}.attention_norm.weight": (128,),
            "model.layers.{}.ffn_norm.weight": (128,),
            "model.layers.{}.attention.wqkv.weight": (256, 128),
            "model.layers.{}.attention.wo.weight": (128, 128),
            "model.layers.{}.feed_forward.w1.weight": (192, 128),
            "model.layers.{}.feed_forward.w3.weight": (192, 128),
            "model.layers.{}.feed_forward.w2.weight": (128, 192),
        },
    ),
    Family(
        "MiniCPM",
        {
            **WRITTEN,
            "architectures": ["MiniCPMForCausalLM"],
            "scale_emb": 1,
            "scale_depth": 1.4,
            "dim_model_base": 128,
        },
        weights=LLAMA,
    ),
    Family(
        "Solar",
        {
            **WRITTEN,
            "architectures": ["SolarForCausalLM"],
            "bskcn_1": [],
            "bskcn_2": [],
            "bskcn_3": [],
            "bskcn_4": [],
            "bskcn_tv": [0.9, 0.8],
        },
        weights=LLAMA,
    ),
    Family(
        "EXAONE",
        {
            **WRITTEN,
            "architectures": ["ExaoneForCausalLM"],
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-5,
            "num_layers": 2,
        },
        weights={
            "transformer.wte.weight": (512, 128),
            "lm_head.weight": (512, 128),
            "transformer.ln_f.weight": (128,),
            "transformer.h.{}.ln_1.weight": (128,),
            "transformer.h.{}.ln_2.weight": (128,),
            **{f"transformer.h.{{}}.attn.attention.{n}.weight": s for n, s in _ATTENTION.items()},
            "transformer.h.{}.attn.attention.out_proj.weight": (128, 128),
            "transformer.h.{}.mlp.c_fc_0.weight": (192, 128),
            "transformer.h.{}.mlp.c_fc_1.weight": (192, 128),
            "transformer.h.{}.mlp.c_proj.weight": (128, 192),
        },
    ),
    Family(
        "ChatGLM",
        {
            **SMALL,
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "num_layers": 2,
            "padded_vocab_size": 512,
            "ffn_hidden_size": 192,
            "kv_channels": 32,
            "seq_length": 128,
            "layernorm_epsilon": 1e-5,
            "rmsnorm": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "original_rope": True,
        },
        weights={
            "transformer.embedding.word_embeddings.weight": (512, 128),
            "transformer.output_layer.weight": (512, 128),
            "transformer.encoder.final_layernorm.weight": (128,),
            "transformer.encoder.layers.{}.input_layernorm.weight": (128,),
            "transformer.encoder.layers.{}.post_attention_layernorm.weight": (128,),
            "transformer.encoder.layers.{}.self_attention.query_key_value.weight": (256, 128),
            "transformer.encoder.layers.{}.self_attention.dense.weight": (128, 128),
            "transformer.encoder.layers.{}.mlp.dense_h_to_4h.weight": (384, 128),
            "transformer.encoder.layers.{}.mlp.dense_4h_to_h.weight": (128, 192),
        },
    ),
)
