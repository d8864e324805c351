"""A mixer with LoRA on the layers to which it passes a part of a batch, on one TP rank.

The mixer is vLLM's own. Its kernels are replaced by functions of one token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from support import layers
from support.cpu import disable_pinned_memory
from support.mla import make_punica_wrapper

HIDDEN, STATE, INNER, TIME_STEP, HEADS = 16, 4, 32, 8, 4
SLOTS, MAX_RANK, RANK = 3, 8, 4
PREFIX = "model.layers.0.mixer"
CACHE: Any = SimpleNamespace(mamba_block_size=1, mamba_cache_mode="none")
#: Per model LoRA's layers, and the rows and the columns of their weights.
LAYERS = {
    "mamba": {"x_proj": (TIME_STEP + 2 * STATE, INNER), "dt_proj": (INNER, TIME_STEP)},
    "plamo2": {"bcdt_proj": (64 + 2 * STATE, INNER), "dt_proj": (HEADS, 64)},
}
MODULES = {
    "mamba": "vllm.model_executor.layers.mamba.mamba_mixer",
    "plamo2": "vllm.model_executor.models.plamo2",
}


@dataclass(frozen=True)
class Case:
    """A batch: the slot of each token that is decoded and of each that is prefilled; -1 for none.

    Attributes:
        padding: tokens that vLLM adds at the end.
        corrected: whether the package corrects the mixer.
        model: ``mamba`` or ``plamo2``.
        is_normed: whether Mamba's mixer normalises what ``x_proj`` makes, as Falcon-Mamba's does.
        has_lora: whether an adapter is in each slot.
        is_known: whether the package knows the parts of the batch.
    """

    decoded: tuple[int, ...] = ()
    prefilled: tuple[int, ...] = ()
    padding: int = 0
    corrected: bool = True
    fully_sharded: bool = False
    model: str = "mamba"
    is_normed: bool = False
    has_lora: bool = True
    is_known: bool = True

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot of each token."""
        return self.decoded + self.prefilled


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mixer's output with LoRA, with merged weights, and with neither, ``(tokens, HIDDEN)``."""
    from vllm.config import VllmConfig, set_current_vllm_config

    os.environ["VLLM_NWAY_LORA"] = "1"
    disable_pinned_memory()
    with torch.inference_mode():
        merged = []
        for slot in range(-1, SLOTS):
            with set_current_vllm_config(VllmConfig()):
                merged.append(forward(build(case, slot), case))
        rows = torch.arange(len(case.slots))
        expected = torch.stack(merged)[torch.tensor(case.slots) + 1, rows]
        with set_current_vllm_config(VllmConfig()):
            mixer = build(case, -1)
            add_lora(mixer, case)
            return forward(mixer, case), expected, merged[0]


def draw(name: str, *shape: int) -> torch.Tensor:
    """Return the numbers of a tensor, which depend on its name only."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 2


def draw_pair(case: Case, layer: str, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return LoRA-A and LoRA-B of one slot."""
    rows, columns = LAYERS[case.model][layer]
    return draw(f"{layer} a{slot}", RANK, columns), draw(f"{layer} b{slot}", rows, RANK)


def build(case: Case, merged: int) -> Any:
    """Build a mixer; ``merged``: the slot whose adapter is added to its weights, -1 for none."""
    mixer = _build_plamo2() if case.model == "plamo2" else _build_mamba(case)
    sizes = LAYERS[case.model]
    caches = torch.zeros(2, 1, 1, 1)
    mixer.kv_cache = (
        caches,
        caches,
    )  # of convolutions and of states; in old releases, per virtual engine
    for name, parameter in mixer.named_parameters():
        layer, _, kind = name.partition(".")
        if kind != "weight" or layer == "conv1d" or "norm" in layer:
            parameter.data.fill_(0.5)
        elif layer == "in_proj":
            for part in (0, 1):
                mixer.in_proj.weight_loader(parameter, draw(f"{name}{part}", INNER, HIDDEN), part)
        else:
            weight = draw(name, *sizes.get(layer, (HIDDEN, INNER)))
            if merged >= 0 and layer in sizes:
                a, b = draw_pair(case, layer, merged)
                weight += b @ a
            getattr(mixer, layer).weight_loader(parameter, weight)
    for layer in mixer.children():
        if hasattr(layer, "quant_method"):  # vLLM packs weights for its CPU kernels
            layer.quant_method.apply = _apply_linear
    return mixer


def _build_mamba(case: Case) -> Any:
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    return MambaMixer(
        hidden_size=HIDDEN,
        ssm_state_size=STATE,
        conv_kernel_size=4,
        intermediate_size=INNER,
        time_step_rank=TIME_STEP,
        use_conv_bias=True,
        use_bias=False,
        use_rms_norm=case.is_normed,
        is_lora_enabled=True,
        cache_config=CACHE,
        prefix=PREFIX,
    )


def _build_plamo2() -> Any:
    from vllm.model_executor.models.plamo2 import Plamo2MambaMixer

    config = SimpleNamespace(
        hidden_size=HIDDEN,
        hidden_size_per_head=INNER // HEADS,
        mamba_num_heads=HEADS,
        mamba_d_state=STATE,
        mamba_d_conv=4,
        mamba_chunk_size=4,
        rms_norm_eps=1e-5,
    )
    model_config = SimpleNamespace(hf_config=config)
    return Plamo2MambaMixer(
        SimpleNamespace(
            model_config=model_config, cache_config=CACHE, quant_config=None, lora_config=True
        ),
        prefix=PREFIX,
    )


def _apply_linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.linear(x, layer.weight, bias)


def add_lora(mixer: Any, case: Case) -> None:
    """Put LoRA layers on a mixer, and have the package correct them if the case says so."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils

    from vllm_nway_lora.layers.mixers import correct_mixers
    from vllm_nway_lora.layers.punica import group_by_adapter

    config = LoRAConfig(
        max_lora_rank=MAX_RANK,
        max_loras=layers.MAX_LORAS,
        fully_sharded_loras=case.fully_sharded,
        lora_dtype=torch.float32,
    )
    wrapper = group_by_adapter(make_punica_wrapper(config))
    layers.map_tokens(wrapper, list(case.slots))
    for name in LAYERS[case.model]:
        lora_layer = utils.from_layer(getattr(mixer, name), layers.MAX_LORAS, config, [], None)
        lora_layer.set_mapping(wrapper)
        setattr(mixer, name, lora_layer)
        for slot in range(SLOTS if case.has_lora else 0):
            lora_layer.set_lora(slot, *draw_pair(case, name, slot))
    if case.corrected:
        correct_mixers(nn.Sequential(mixer))


def forward(mixer: Any, case: Case) -> torch.Tensor:
    """Return the mixer's output for the tokens of a batch."""
    from vllm_nway_lora.layers import mixers

    tokens = len(case.slots)
    hidden = draw("hidden", tokens + case.padding, HIDDEN)
    output = torch.zeros_like(hidden)
    parts = mixers._list_parts if case.is_known else lambda prefix: iter(())
    with _context(case), _kernels(case), mock.patch.object(mixers, "_list_parts", parts):
        mixer.forward_impl(hidden_states=hidden, output=output)
    return output[:tokens]


@contextlib.contextmanager
def _context(case: Case) -> Iterator[None]:
    from vllm.forward_context import override_forward_context
    from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionMetadata
    from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata

    kind: Any = Mamba2AttentionMetadata if case.model == "plamo2" else Mamba1AttentionMetadata
    metadata = kind.__new__(kind)
    for field in dataclasses.fields(kind):
        setattr(metadata, field.name, torch.zeros(1, dtype=torch.int64))
    metadata.num_decode_tokens, metadata.num_prefill_tokens = len(case.decoded), len(case.prefilled)
    metadata.num_decodes, metadata.num_prefills = len(case.decoded), int(bool(case.prefilled))
    metadata.has_initial_states_p = None
    context: Any = SimpleNamespace(attn_metadata={PREFIX: metadata}, virtual_engine=0)
    with override_forward_context(context):
        yield


@contextlib.contextmanager
def _kernels(case: Case) -> Iterator[None]:
    kernels = {
        "causal_conv1d_fn": lambda x, *args, **kwargs: x,
        "causal_conv1d_update": lambda x, *args, **kwargs: x,
        **(
            {
                "mamba_chunk_scan_combined_varlen": _scan_heads,
                "selective_state_update": _update_heads,
            }
            if case.model == "plamo2"
            else {"selective_scan_fn": _scan, "selective_state_update": _update}
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch(f"{MODULES[case.model]}.{name}", kernel))
        yield


def _scan(u: Any, _: Any, delta: Any, a: Any, b: Any, c: Any, *args: Any, **kwargs: Any) -> Any:
    """Return ``(channels, tokens)``."""
    return u * delta + (b * c).sum(0)


def _update(
    state: Any, x: Any, dt: Any, a: Any, b: Any, c: Any, *_: Any, out: Any, **__: Any
) -> None:
    """Set ``out``, ``(tokens, channels)``."""
    out.copy_(_scan(x.T, state, dt.T, a, b.T, c.T).T)


def _scan_heads(x: Any, dt: Any, a: Any, b: Any, c: Any, *_: Any, out: Any, **__: Any) -> Any:
    """Set ``out``, ``(tokens, heads, channels)``; return the new states."""
    out.copy_(x * dt[..., None] + (b * c).sum(-1, keepdim=True))
    return torch.zeros(1)


def _update_heads(state: Any, x: Any, dt: Any, *args: Any, out: Any, **kwargs: Any) -> None:
    """Set ``out``, ``(tokens, heads, channels)``."""
    _scan_heads(x, dt[..., 0], *args, out=out)
