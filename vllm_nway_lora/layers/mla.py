# SPDX-License-Identifier: Apache-2.0
"""LoRA on ``kv_b_proj`` of MLA attention, which reads that layer's weight itself.

During decode, the attention multiplies by parts that it cut from the weight when the model was loaded.
During prefill, its implementation calls the base layer. This module replaces functions of both objects,
per attention layer, and adds LoRA to their results. It does so only if all readers of the weight are known
functions of vLLM's ``MLAAttention`` and ``MLACommonImpl``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from vllm import platforms
from vllm.config import get_current_vllm_config_or_none
from vllm.lora.layers.column_parallel_linear import ColumnParallelLinearWithLoRA
from vllm.model_executor.layers.attention.mla_attention import MLAAttention, MLACommonImpl

from vllm_nway_lora.layers.mla_calls import CorrectedAttention

#: The functions of vLLM's classes that are corrected. A subclass must not have its own.
_OF_ATTENTION = ("forward", "forward_impl", "_v_up_proj")
_OF_IMPLEMENTATION = ("forward_mha", "_compute_prefill_context")
#: Functions that may name the layer or its parts: these, those that build the parts, and one that runs
#: only with context parallelism.
_KNOWN = frozenset(
    {
        *_OF_ATTENTION,
        *_OF_IMPLEMENTATION,
        "__init__",
        "process_weights_after_loading",
        "_context_parallel_compute_prefill_context",
    }
)
_PARTS = frozenset({"kv_b_proj", "W_UK", "W_UK_T", "W_UV", "W_K", "W_V"})
#: What a module that holds the attention must not use of it.
_INNER = _PARTS - {"kv_b_proj"} | {"forward_impl", "forward_mha", "forward_mqa", "_v_up_proj"}
#: Flags of an attention whose kernels have their own copy of the weight.
_OWN_COPIES = (
    "is_aiter_triton_fp4_bmm_enabled",
    "is_aiter_triton_fp8_bmm_enabled",
    "is_amx_bmm_enabled",
)
_CACHES = ("auto", "bfloat16", "float16", "half", "float32")


def correct_attention(model: nn.Module) -> dict[int, str]:
    """Serve LoRA on ``kv_b_proj`` in the MLA attention layers where it can be exact.

    Returns:
        The identity of each such base layer -> the reason why its attention was not corrected, empty
        where it was.
    """
    found: dict[int, str] = {}
    for attention, parents in _list_attention(model):
        lora_layer = attention.kv_b_proj
        try:
            reason = find_obstacle(attention, lora_layer, parents)
            if not reason:
                CorrectedAttention(attention, lora_layer).install()
        except Exception as error:  # another release or platform has other attributes
            reason = str(error)
        found[id(lora_layer.base_layer)] = reason
    return found


def _list_attention(model: nn.Module) -> list[tuple[Any, list[nn.Module]]]:
    """Return the attention layers whose ``kv_b_proj`` has LoRA, each with the modules that hold it."""
    parents: dict[Any, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, MLAAttention) and hasattr(
                getattr(child, "kv_b_proj", None), "base_layer"
            ):
                parents.setdefault(child, []).append(parent)
    return list(parents.items())


def find_obstacle(attention: Any, lora_layer: Any, parents: list[nn.Module]) -> str:
    """Return why LoRA on an attention's ``kv_b_proj`` cannot be exact; empty if it can.

    Args:
        attention: the layer, before its functions are replaced.
        lora_layer: the LoRA layer on its ``kv_b_proj``.
        parents: the modules that hold ``attention``.
    """
    platform = platforms.current_platform
    if not (platform.is_cpu() or platform.is_cuda()):
        return f"its kernels on {platform.device_name} are not known"
    if name := _find_own_function(type(attention), MLAAttention, _OF_ATTENTION):
        return f"{name} is its own"
    if name := _find_own_function(type(attention.impl), MLACommonImpl, _OF_IMPLEMENTATION):
        return f"{name} is its own"
    readers = {
        *list_users(type(attention), _PARTS, _KNOWN),
        *list_users(type(attention.impl), _PARTS, _KNOWN),
        *(user for parent in parents for user in list_users(type(parent), _INNER, frozenset())),
    }
    if readers:
        return f"{min(readers)} reads the weight too"
    if getattr(attention, "use_sparse", False):
        return "its attention is sparse"
    if any(getattr(attention, flag, False) for flag in _OWN_COPIES):
        return "its kernels have their own copy of the weight"
    if attention.kv_cache_dtype not in _CACHES:
        return f"its cache is {attention.kv_cache_dtype}"
    config = get_current_vllm_config_or_none()
    if attention.impl.dcp_world_size > 1 or _splits_tokens(config):
        return "context parallelism or dual-batch overlap splits its tokens"
    if platform.is_cuda() and _is_recorded(config):
        return (
            "CUDA graphs record its decode without LoRA. It is served with --enforce-eager, or with "
            "cudagraph_mode PIECEWISE"
        )
    return _compare_shapes(attention, lora_layer)


def _find_own_function(owner: type, generic: type, names: Iterable[str]) -> str:
    """Return the first function that a class does not have from ``generic``; empty if there is none."""
    for name in names:
        if getattr(owner, name, None) is not getattr(generic, name, ""):
            return f"{owner.__qualname__}.{name}"
    return ""


def list_users(owner: type, names: frozenset[str], known: frozenset[str]) -> Iterator[str]:
    """Yield the functions of a class that name one of ``names``, without those in ``known``."""
    for base in owner.__mro__:
        for member_name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "fget", member))
            code = getattr(function, "__code__", None)
            if code is not None and member_name not in known and names & {*code.co_names}:
                yield f"{base.__qualname__}.{member_name}"


def _splits_tokens(config: Any) -> bool:
    """Return whether an attention layer does not see all tokens of a batch, or not all of their context."""
    parallel = getattr(config, "parallel_config", None)
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return any(getattr(parallel, size, 1) > 1 for size in sizes) or bool(
        getattr(parallel, "enable_dbo", False)
    )


def _is_recorded(config: Any) -> bool:
    """Return whether CUDA graphs may have the attention in them."""
    if config is None:
        return True
    mode = config.compilation_config.cudagraph_mode
    return not config.model_config.enforce_eager and mode.has_full_cudagraphs()


def _compare_shapes(attention: Any, lora_layer: Any) -> str:
    if not isinstance(lora_layer, ColumnParallelLinearWithLoRA) or lora_layer.n_slices != 1:
        return f"{type(lora_layer).__qualname__} is its LoRA layer"
    [a], [b] = lora_layer.lora_a_stacked, lora_layer.lora_b_stacked
    rows = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    if b.shape[2] != rows or a.shape[3] != attention.kv_lora_rank:
        return "its LoRA tensors have other shapes than its heads"
    if a.shape[2] != b.shape[3]:
        return "--fully-sharded-loras has cut its LoRA-A"
    return ""
