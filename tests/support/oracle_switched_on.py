"""Families of the oracle whose classes lack vLLM's flags for LoRA (``models/switched_on.py``)."""

from __future__ import annotations

from support.oracle_family import Family
from support.oracle_sizes import TIED, of
from support.oracle_written import LLAMA, WRITTEN

_MAMBA = {"state_size": 16, "conv_kernel": 4, "expand": 2, "use_mambapy": False, **TIED}

SWITCHED_ON_FAMILIES = (
    of(
        "GPT-2",
        "gpt2",
        "GPT2LMHeadModel",
        n_embd=128,
        n_head=4,
        n_layer=2,
        n_positions=128,
        transposed=("c_attn", "c_proj", "c_fc"),
        **TIED,
    ),
    of(
        "Gemma 3n",
        "gemma3n_text",
        "Gemma3nForCausalLM",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32,
        intermediate_size=[192] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=32,
        laurel_rank=8,
        altup_num_inputs=2,
        altup_active_idx=0,
        **TIED,
    ),
    of("Mamba", "mamba", "MambaForCausalLM", **_MAMBA, time_step_rank=8),
    of(
        "Mamba 2",
        "mamba2",
        "Mamba2ForCausalLM",
        **_MAMBA | {"state_size": 64},
        num_heads=4,
        head_dim=64,
        n_groups=1,
        chunk_size=64,
    ),
    of("StableLM", "stablelm", "StableLmForCausalLM"),
    Family(
        "Orion",
        {**WRITTEN, "architectures": ["OrionForCausalLM"]},
        weights=LLAMA
        | {name.replace("weight", "bias"): size for name, size in LLAMA.items() if "norm" in name},
    ),
)
