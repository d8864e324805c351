"""One MLA attention layer with LoRA on ``kv_b_proj`` on one TP rank.

The functions of the attention are vLLM's own. What they call of kernels is plain torch here: the gather
of the context, the attention of a prefill and of a decode, and the merging of both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from support import layers
from support.cpu import disable_pinned_memory
from support.mla_cases import (
    HEADS,
    LATENT,
    MAX_LORAS,
    MAX_RANK,
    NOPE,
    ROPE,
    SCALE,
    VALUE,
    Case,
    Tensors,
    make_tensors,
)
from support.mla_kernels import Kernels, build_implementation


class Holder(nn.Module):
    """What holds the attention."""


def run(case: Case) -> torch.Tensor:
    """Return the output of vLLM's attention on this TP rank, ``(tokens, heads of this rank * VALUE)``."""
    attention, lora_layer, tensors = build(case)
    rank, heads = lora_layer.tp_rank, attention.num_heads
    with correct(case, attention) as reasons:
        assert list(reasons.values()) == [""]
        for slot, pair in enumerate(tensors.adapters):
            lora_layer.set_lora(slot, *pair)
        return forward(case, attention, tensors, slice(rank * heads, (rank + 1) * heads))


def find_reason(case: Case, change: Callable[[Any, contextlib.ExitStack], None]) -> str:
    """Return why the attention of a case is not corrected after a change; it must stay as it was."""
    attention, lora_layer, _ = build(case)
    with contextlib.ExitStack() as stack:
        change(attention, stack)
        before = dict(vars(attention)), dict(vars(attention.impl)), dict(vars(lora_layer))
        [reason] = stack.enter_context(correct(case, attention)).values()
        after = dict(vars(attention)), dict(vars(attention.impl)), dict(vars(lora_layer))
        assert (before == after) is bool(reason)
        return reason


def decode_around(case: Case) -> str:
    """Return the error of a caller that decodes without ``forward_impl``, and none before LoRA is set."""
    from vllm_nway_lora.layers.mla_calls import MLAError

    attention, lora_layer, tensors = build(case)
    query = torch.ones(1, attention.num_heads, LATENT), torch.ones(1, attention.num_heads, ROPE)
    with correct(case, attention):
        attention.impl.kernels = Kernels(attention.impl, case.requests)
        attention.impl.forward_mqa(query, tensors.cache, None, attention)
        lora_layer.set_lora(0, *tensors.adapters[0])
        try:
            attention.impl.forward_mqa(query, tensors.cache, None, attention)
        except MLAError as error:
            lora_layer.reset_lora(0)
            attention.impl.forward_mqa(query, tensors.cache, None, attention)
            return str(error)
    return ""


@contextlib.contextmanager
def correct(case: Case, attention: Any) -> Iterator[dict[int, str]]:
    """Have the package correct an attention, below a model; yield its reasons."""
    from vllm_nway_lora.layers import mla, mla_products

    model, holder = nn.Module(), Holder()
    model.self_attn, holder.mla_attn = holder, attention
    add = mla_products._add_masked if case.masked else mla_products._add
    with mock.patch.object(mla_products, "_add", add):
        yield mla.correct_attention(model)


def build(case: Case) -> tuple[Any, Any, Tensors]:
    """Build the attention on this TP rank, its weight loaded, and the LoRA layer on ``kv_b_proj``."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils, worker_manager  # noqa: F401  (this import applies the patches)
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    import vllm_nway_lora

    os.environ["VLLM_NWAY_LORA"] = "1"
    vllm_nway_lora.register()
    disable_pinned_memory()
    tensors = make_tensors(case)
    rows = HEADS * (NOPE + VALUE)
    base = ColumnParallelLinear(
        LATENT,
        rows,
        bias=False,
        params_dtype=case.dtype,
        prefix="model.layers.0.self_attn.kv_b_proj",
    )
    # To 0.24, no MLA attention runs on CPU: vLLM packs the weight, which this attention reads.
    base.quant_method.apply = apply_linear
    base.weight.weight_loader(base.weight, tensors.weight)
    attention = build_attention(base, HEADS // base.tp_size, case)
    config = LoRAConfig(
        max_lora_rank=MAX_RANK,
        max_loras=MAX_LORAS,
        fully_sharded_loras=case.fully_sharded,
        lora_dtype=case.dtype,
    )
    lora_layer = utils.from_layer(base, MAX_LORAS, config, [], None)
    lora_layer.set_mapping(make_punica_wrapper(config))
    attention.kv_b_proj = lora_layer
    return attention, lora_layer, tensors


def apply_linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the product with a layer's weight."""
    return nn.functional.linear(x, layer.weight, bias)


def build_attention(base: Any, heads: int, case: Case) -> Any:
    """Build vLLM's attention around a ``kv_b_proj``, without its constructor, which asks for a backend."""
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    attention = MLAAttention.__new__(MLAAttention)
    nn.Module.__init__(attention)
    fields = {
        "num_heads": heads,
        "scale": SCALE,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "kv_lora_rank": LATENT,
        "kv_b_proj": base,
        "kv_cache_dtype": "auto",
        "layer_name": "model.layers.0.self_attn.attn",
        "impl": build_implementation(base, heads, (NOPE, ROPE, VALUE, LATENT), SCALE),
        "is_aiter_triton_fp4_bmm_enabled": False,
        "is_aiter_triton_fp8_bmm_enabled": False,
        "is_amx_bmm_enabled": False,
        **dict.fromkeys(("quant_config", "q_pad_num_heads", "prefill_backend", "hisparse_cache")),
        **dict.fromkeys(("use_pcp", "dcp_q_replicate"), False),
    }
    for name, value in fields.items():
        setattr(attention, name, value)
    set_default_quant_scales(attention, register_buffer=True)
    attention.process_weights_after_loading(case.dtype)
    return attention


def make_punica_wrapper(config: Any) -> Any:
    """Return a new CPU punica wrapper of vLLM."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    return PunicaWrapperCPU(256, 256, "cpu", lora_config=config)


def forward(case: Case, attention: Any, tensors: Tensors, heads: slice) -> torch.Tensor:
    """Run the attention of some heads on a batch that vLLM has padded by two tokens."""
    slots = [request.slot for request in case.requests for _ in range(request.new)]
    layers.map_tokens(attention.kv_b_proj.punica_wrapper, slots)
    padded = case.tokens + 2

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_ones((2, *x.shape[1:]))])

    latent, rotary = pad(tensors.new).split([LATENT, ROPE], dim=-1)
    output = torch.empty(padded, attention.num_heads * VALUE, dtype=case.dtype)
    kernels = Kernels(attention.impl, case.requests)
    with kernels.replaced(), torch.inference_mode():
        attention.forward_impl(
            pad(tensors.query[:, heads]),
            latent,
            rotary[:, None],
            tensors.cache,
            build_metadata(case, kernels),
            output=output,
        )
    return output[: case.tokens]


def build_metadata(case: Case, kernels: Any) -> SimpleNamespace:
    """Return vLLM's metadata of a batch."""
    prefills = case.requests[case.decodes :]
    starts = sum_up([request.new for request in prefills])
    contexts = torch.tensor([request.context for request in prefills], dtype=torch.int32)
    prefill = SimpleNamespace(
        block_table=torch.arange(case.decodes, len(case.requests), dtype=torch.int32)[:, None],
        query_start_loc=starts,
        q_data_type=case.dtype,
        prefill_backend=kernels,
        chunked_context=kernels.plan_context(contexts, starts, case.workspace, LATENT + ROPE),
    )
    return SimpleNamespace(
        num_actual_tokens=case.tokens,
        num_decodes=case.decodes,
        num_prefills=len(prefills),
        num_decode_tokens=case.decodes,
        prefill=prefill if prefills else None,
        decode=SimpleNamespace(),
    )


def sum_up(lengths: Sequence[int]) -> torch.Tensor:
    """Return where each part begins, and where the last one ends, as int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
