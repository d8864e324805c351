"""One layer of each of vLLM's LoRA classes on CPU, with full slots and a mapping for tokens and prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from support.layers import MAX_LORAS, MAX_RANK, punica_wrapper

HIDDEN = 32
VOCAB = 96


@dataclass(frozen=True)
class Case:
    """A batch, and the types of the layers.

    Attributes:
        tokens: per token its slot, -1 without LoRA.
        prompts: per prompt its slot.
        dtype: of weights, activations and adapters.
        lora_dtype: of adapters.
        prefill: whether vLLM counts the batch as a prefill.
        has_full_slots: whether the last slot has an adapter.
    """

    tokens: tuple[int, ...]
    prompts: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype = torch.float32
    prefill: bool = True
    has_full_slots: bool = False


def run(case: Case) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return per layer class the output with this package's products and with vLLM's own."""
    import vllm_nway_lora

    vllm_nway_lora.unregister()
    os.environ["VLLM_NWAY_LORA"] = "1"
    torch.manual_seed(5)
    layers = build(case)
    outputs = []
    for plugin in (True, False):
        punica = punica_wrapper(plugin)
        map_batch(punica, case.tokens, case.prompts, case.prefill)
        outputs.append({name: call(layer, punica, case) for name, layer in layers.items()})
    return {name: (outputs[0][name], outputs[1][name]) for name in layers}


def map_batch(
    punica: Any, tokens: Sequence[int], prompts: Sequence[int], prefill: bool = True
) -> None:
    """Map tokens and prompts to slots, as vLLM's manager does."""
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(
        tuple(slot + 1 for slot in tokens), tuple(slot + 1 for slot in prompts), is_prefill=prefill
    )
    punica.update_metadata(mapping, list(range(1, MAX_LORAS + 1)), MAX_LORAS + 1, VOCAB)


def build(case: Case) -> dict[str, Any]:
    """Return a LoRA layer of each class, with random weights and slots."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import utils
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    given: dict[str, Any] = {"bias": False, "params_dtype": case.dtype}
    bases = {
        "column": (linear.ColumnParallelLinear(HIDDEN, 40, **given), ["a"]),
        "merged": (linear.MergedColumnParallelLinear(HIDDEN, [24, 24], **given), ["a", "b"]),
        "qkv": (linear.QKVParallelLinear(HIDDEN, 8, 4, 4, **given), ["q", "k", "v"]),
        "qkv whole": (linear.QKVParallelLinear(HIDDEN, 8, 4, 4, **given), ["qkv"]),
        "row": (linear.RowParallelLinear(HIDDEN, 40, **given), ["a"]),
        "replicated": (linear.ReplicatedLinear(HIDDEN, 40, **given), ["a"]),
        "embedding": (VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=case.dtype), ["a"]),
    }
    config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=MAX_LORAS, lora_dtype=case.lora_dtype)
    layers = {
        name: utils.from_layer(base, MAX_LORAS, config, modules, None)
        for name, (base, modules) in bases.items()
    }
    head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=case.dtype)
    layers["logits"] = utils.from_layer_logits_processor(
        LogitsProcessor(VOCAB), head, MAX_LORAS, config, SimpleNamespace()
    )
    for layer in (*(base for base, _ in bases.values()), head):
        layer.weight.data.normal_()
        layer.quant_method.process_weights_after_loading(layer)
    layers["logits"].head = [head]  # in a list, so that it is no submodule
    for layer in layers.values():
        for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
            for tensor in [stacked] if isinstance(stacked, torch.Tensor) else stacked:
                tensor.normal_()
                if not case.has_full_slots:
                    tensor[-1] = 0
    return layers


def call(layer: Any, punica: Any, case: Case) -> torch.Tensor:
    """Run one layer on the batch."""
    layer.set_mapping(punica)
    generator = torch.Generator().manual_seed(6)
    if hasattr(layer, "head"):
        rows = torch.randn(len(case.prompts), HIDDEN, generator=generator).to(case.dtype)
        logits: torch.Tensor = layer._get_logits(rows, layer.head[0], None)
        return logits.detach()
    count = len(case.tokens)
    if "Embedding" in type(layer).__name__:
        output = layer(torch.randint(VOCAB, (count,), generator=generator))
    else:
        output = layer(torch.randn(count, HIDDEN, generator=generator).to(case.dtype))
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found.detach()
