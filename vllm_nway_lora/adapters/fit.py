# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter's tensors fit the layer that takes them, for our layer and vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import (
    FusedMoE3DWithLoRA,
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from vllm_nway_lora.layer import LoRATensorError, NWayLinearWithLoRA


def given_to(manager: Any, adapter: Any, name: str, layer: nn.Module) -> list[tuple[str, Any]]:
    """Return what vLLM would hand to a layer, by its own look-up; None for modules left out."""
    names = list(manager.packed_modules.get(name, ())) or [name]
    # The experts of a 3D mixture: `experts` is down_proj, `experts.base_layer` gate_up_proj.
    if isinstance(layer, FusedMoE3DWithLoRA) or (
        isinstance(layer, FusedMoEWithLoRA)
        and getattr(manager, "_enable_mixed_moe_lora_format", False)
        and getattr(adapter, "is_3d_lora_weight", False)
    ):
        names = [name, f"{name}.base_layer"]
    return [(module, manager._get_lora_layer_weights(adapter, module)) for module in names]


def problems_of(manager: Any, name: str, layer: Any, given: Sequence[tuple[str, Any]]) -> list[str]:
    """Return what keeps ``layer`` from applying exactly what it is given, as phrases."""
    is_moe = isinstance(layer, FusedMoEWithLoRA)
    max_rank = manager.lora_config.max_lora_rank
    found = [
        f"module {module}: {problem}"
        for module, weights in given
        if weights is not None
        for problem in pair_problems(weights, max_rank, is_moe)
    ]
    return found or list(_layer_problems(manager, name, layer, given))


def pair_problems(weights: Any, max_rank: int, is_moe: bool) -> Iterator[str]:
    """Yield what is wrong with one module's A and B, whatever the layer."""
    a, b = weights.lora_a, weights.lora_b
    if a is None or b is None:
        given, missing = ("B", "A") if a is None else ("A", "B")
        yield f"it has LoRA-{given} but no LoRA-{missing}"
        return
    shapes = f"LoRA-A {tuple(a.shape)} and LoRA-B {tuple(b.shape)}"
    if a.ndim != b.ndim or a.ndim not in ((2, 3) if is_moe else (2,)):
        yield f"expected two-dimensional tensors, found {shapes}"
        return
    rank = a.shape[-2]
    if rank != b.shape[-1]:
        yield f"the ranks of {shapes} differ"
    # A 3D mixture's experts lie one after another along the rank's dimension.
    elif rank != weights.rank and not (is_moe and rank and rank % weights.rank == 0):
        yield f"adapter_config.json says rank {weights.rank}, found {shapes}"
    elif weights.rank > max_rank:
        yield f"its rank {weights.rank} is above --max-lora-rank {max_rank}"
    # vLLM multiplies B by the scaling once the adapter is in.
    for half, tensor, factor in (("A", a, 1.0), ("B", b, weights.scaling)):
        # One pass and no temporary: the extremes of a tensor with a NaN are NaN.
        if tensor.numel() and not all((x * factor).isfinite() for x in torch.aminmax(tensor)):
            yield f"LoRA-{half} times its scaling {factor} has NaN or infinity in {tensor.dtype}"


def _layer_problems(
    manager: Any, name: str, layer: Any, given: Sequence[tuple[str, Any]]
) -> Iterator[str]:
    """Yield what is wrong between a layer and the sound pairs that are for it."""
    if isinstance(layer, NWayLinearWithLoRA):
        try:
            layer.check(
                [weights and weights.lora_a for _, weights in given],
                [weights and weights.lora_b for _, weights in given],
            )
        except LoRATensorError as error:
            yield str(error)
        return
    if isinstance(layer, FusedMoEWithLoRA):
        yield from _moe_problems(manager, name, given)
        return
    widths = _step5_widths(manager, name, layer) or _widths(layer, len(given))
    for (module, weights), expected in zip(given, widths, strict=False):
        if weights is None:
            continue
        found = (weights.lora_a.shape[1], weights.lora_b.shape[0])
        if any(e is not None and e != f for e, f in zip(expected, found, strict=True)):
            columns, rows = ("any" if e is None else e for e in expected)
            kind = type(getattr(layer, "base_layer", layer)).__name__
            yield (
                f"module {module} (layer {name}, {kind}): expected LoRA-A (r, {columns}) and LoRA-B "
                f"({rows}, r), found {tuple(weights.lora_a.shape)} and {tuple(weights.lora_b.shape)}"
            )


def _widths(layer: Any, modules: int) -> Sequence[tuple[int | None, int | None]]:
    """Return A's columns and B's rows over all ranks for each module of one of vLLM's own layers.

    None stands for a number that cannot be told: the layer places its rows with a loader of its
    own, so that a checkpoint's rows need not be the layer's.
    """
    if isinstance(layer, LogitsProcessorWithLoRA):
        return [(layer.hidden_size, layer.base_layer.vocab_size)]
    base: Any = getattr(layer, "base_layer", None)
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return [(base.org_vocab_size, base.embedding_dim)]
    if not isinstance(base, LinearBase):
        return []
    rows: list[int]
    if isinstance(base, QKVParallelLinear):
        # Not `output_sizes`, which counts replicated heads of K and V once per rank.
        head = base.head_size
        kv = base.total_num_kv_heads
        rows = [base.total_num_heads * head, kv * head, kv * getattr(base, "v_head_size", head)]
    elif isinstance(base, MergedColumnParallelLinear):
        rows = list(base.output_sizes)
    else:
        rows = [base.output_size]
    if modules == 1:
        rows = [sum(rows)]
    own_loader = isinstance(base, ColumnParallelLinear) and type(base).weight_loader not in (
        ColumnParallelLinear.weight_loader,
        MergedColumnParallelLinear.weight_loader,
        QKVParallelLinear.weight_loader,
    )
    if own_loader or len(rows) != modules:
        return [(base.input_size, None)] * modules
    return [(base.input_size, count) for count in rows]


def _step5_widths(manager: Any, name: str, layer: Any) -> Sequence[tuple[int, int]]:
    """Return what :func:`_widths` does for Step5's two layers; none for any other.

    Their loaders take a part by offsets, and ignore rows beyond (models/step5/nvidia/model.py).
    """
    base: Any = getattr(layer, "base_layer", None)
    kind = type(base).__name__
    if kind == "Step5SparseIndexerIndexTPLinear":
        return [(base.input_size, base.output_size)]
    if kind != "Step5FusedQKVIndexerLinear":
        return []
    # How many heads the indexer has in all is known to its other layer alone.
    other = manager.model.get_submodule(f"{name.rpartition('.')[0]}.sparse_indexer_w")
    heads = getattr(other, "base_layer", other).output_size
    q, kv = base.total_num_heads * base.head_size, base.total_num_kv_heads * base.head_size
    index_kv = base.local_index_k_size * base.tp_size // base.index_kv_head_replicas
    gate = base.local_gate_size * base.tp_size
    rows = (q, kv, kv, heads * base.proxy_dim, index_kv, index_kv, gate)
    return [(base.input_size, count) for count in rows]


def _moe_problems(manager: Any, name: str, given: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Yield what keeps vLLM from stacking a mixture's experts: it needs them all, and alike."""
    weights_of = dict(given)
    local = list(weights_of)
    if hasattr(manager, "_restrict_to_local_experts"):  # from 0.22.0 on
        local = manager._restrict_to_local_experts(name, local)
    missing = [module for module in local if weights_of[module] is None]
    if missing and len(missing) < len(local):
        yield (
            f"layer {name}: all {len(local)} modules of its experts are needed, {missing[0]} and "
            f"{len(missing) - 1} others are missing"
        )
    if missing:
        return
    kinds = 2 if manager._is_non_gated_moe else 3
    if len(local) > kinds:
        for kind in range(kinds):
            shapes = {
                (tuple(weights_of[m].lora_a.shape), tuple(weights_of[m].lora_b.shape))
                for m in local[kind::kinds]
            }
            if len(shapes) > 1:
                yield f"layer {name}: its experts have different shapes: {sorted(shapes)[:2]}"
