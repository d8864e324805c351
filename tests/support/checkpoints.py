"""Tiny random checkpoints of real architectures, generated locally: no downloads, no fixture files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Large enough that LoRA changes logprobs by 1 or more, far above rounding noise.
WEIGHT_STD = 0.08
VOCAB_SIZE = 512


_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": WEIGHT_STD,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Two gated-delta-net layers and one full-attention layer. vLLM's CPU kernels accept these head dims
# (attention 64, GDN 128). With four value heads and two key heads, each of two TP ranks has a whole
# number of heads.
_GDN: dict[str, Any] = {
    **_SMALL,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
# As in the published checkpoints. The CPU kernel of vLLM 0.28.0 takes no state of bfloat16.
_FLOAT32_STATE = {"mamba_ssm_dtype": "float32"}


def save_qwen3_5(folder: Path, **sizes: Any) -> Path:
    """Save a tiny Qwen3.5 text model; ``sizes`` replaces fields of its configuration."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**_GDN | _FLOAT32_STATE | sizes)
    return _save(Qwen3_5ForCausalLM, config, folder)


# In bfloat16, rounding would choose other experts, so each token has all of them.
_MIXTURE: dict[str, Any] = {
    **{key: value for key, value in _GDN.items() if key != "intermediate_size"},
    **_FLOAT32_STATE,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def save_qwen3_5_moe(folder: Path) -> Path:
    """Save a tiny Qwen3.5-MoE text model, with a shared expert in each layer."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    return _save(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**_MIXTURE), folder)


def save_qwen3_5_moe_multimodal(folder: Path) -> Path:
    """Save the same text model below the class of the published checkpoints, with a vision tower."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": _MIXTURE["hidden_size"],
    }
    config = Qwen3_5MoeConfig(text_config=_MIXTURE, vision_config=vision)
    return _save(Qwen3_5MoeForConditionalGeneration, config, folder)


def save_fused_llama(folder: Path) -> Path:
    """Save the two-layer model of ``fused_llama``, which the CPU build of every release can run."""
    from transformers import LlamaConfig

    from support.fused_llama import FusedLlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=WEIGHT_STD,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _save(FusedLlamaForCausalLM, config, folder)


def save_qwen3_next(folder: Path) -> Path:
    """Save a Qwen3-Next without experts; vLLM can build it with ``dense_qwen3_next``."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(**_GDN, mlp_only_layers=[0, 1, 2], num_experts=0)
    return _save(Qwen3NextForCausalLM, config, folder)


def save_granite_hybrid(folder: Path, **sizes: Any) -> Path:
    """Save a Granite 4 hybrid: two Mamba2 layers with one group, one attention layer, no experts.

    ``sizes`` replaces fields of its configuration.
    """
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    fields: dict[str, Any] = {
        **_SMALL,
        "layer_types": ["mamba", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "attention_multiplier": 1 / 8,
        "position_embedding_type": "rope",
    }
    config = GraniteMoeHybridConfig(**fields | sizes)
    return _save(GraniteMoeHybridForCausalLM, config, folder)


def save_falcon_h1(folder: Path) -> Path:
    """Save a Falcon-H1: two layers of Mamba2, with two groups, beside attention."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **_SMALL | {"num_hidden_layers": 2},
        mamba_d_ssm=1024,
        mamba_n_heads=64,
        mamba_d_head=16,
        mamba_d_state=64,
        mamba_n_groups=2,
        mamba_chunk_size=64,
    )
    return _save(FalconH1ForCausalLM, config, folder)


def save_lfm2(folder: Path) -> Path:
    """Save an LFM2: two short-convolution layers and one attention layer."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **_SMALL,
        layer_types=["conv", "conv", "full_attention"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        # vLLM reads these fields; published checkpoints have them, transformers' class does not.
        block_dim=128,
        block_ff_dim=256,
        conv_dim=128,
    )
    return _save(Lfm2ForCausalLM, config, folder)


def save_afmoe(folder: Path) -> Path:
    """Save an AFMoE without experts: three layers whose attention has q, k, v and a gate."""
    from transformers import AfmoeConfig, AfmoeForCausalLM

    config = AfmoeConfig(
        **_SMALL,
        head_dim=64,
        layer_types=["full_attention"] * 3,
        num_dense_layers=3,
        num_experts=0,
    )
    return _save(AfmoeForCausalLM, config, folder)


def save_llama(folder: Path) -> Path:
    """Save a Llama with four layers; vLLM's own LoRA classes serve its fused projections."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=WEIGHT_STD,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _save(LlamaForCausalLM, config, folder)


def save_deepseek_v3(folder: Path) -> Path:
    """Save a DeepSeek-V3 without experts; its MLA has the sizes for which vLLM's kernels are made."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_SMALL | {"num_key_value_heads": 4, "num_hidden_layers": 2},
        first_k_dense_replace=2,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    return _save(DeepseekV3ForCausalLM, config, folder)


def save_gpt2(folder: Path) -> Path:
    """Save a GPT-2 with two layers; vLLM's class of it has no flags for LoRA."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=WEIGHT_STD,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return _save(GPT2LMHeadModel, config, folder)


def _save(model_class: type, config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a word-level tokenizer in which every token id has its own printable word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w2"
    ).save_pretrained(folder)
