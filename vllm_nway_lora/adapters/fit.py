# SPDX-License-Identifier: Apache-2.0
"""Check that an adapter's tensors fit the layer that uses them, this package's layer or vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import (
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

from vllm_nway_lora.adapters import experts
from vllm_nway_lora.adapters.tensors import find_copy_fault
from vllm_nway_lora.layers.nway import LoRATensorError, NWayLinearWithLoRA
from vllm_nway_lora.layers.readers import find_refusals
from vllm_nway_lora.models import step5
from vllm_nway_lora.rows.pairs import find_pair_fault, find_rank_fault, find_shape_fault


def weights_for_layer(
    manager: Any, adapter: Any, name: str, layer: nn.Module
) -> list[tuple[str, Any]]:
    """Return what vLLM passes to a layer: ``(module, LoRALayerWeights or None)`` per module.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
        name: the layer's path in the model.
        layer: the LoRA layer.
    """
    modules = experts.stacked_modules(manager, adapter, name, layer)
    modules = modules or list(manager.packed_modules.get(name, ())) or [name]
    return [(module, manager._get_lora_layer_weights(adapter, module)) for module in modules]


def validate_layer(
    manager: Any, name: str, layer: Any, weights_of: Sequence[tuple[str, Any]]
) -> list[str]:
    """Return the faults that keep ``layer`` from applying its weights exactly, as phrases.

    Args:
        manager: the rank's ``LoRAModelManager``.
        name: the layer's path in the model.
        layer: the LoRA layer.
        weights_of: its modules and their weights, from :func:`weights_for_layer`.
    """
    max_rank = manager.lora_config.max_lora_rank
    is_stacked = f"{name}.base_layer" in dict(weights_of)
    # `--enable-moe-shared-loras`: a tensor has an expert's matrix or one for all of them.
    is_shared = getattr(manager, "_enable_moe_shared_loras", False)
    dims = 3 if is_shared and isinstance(layer, FusedMoEWithLoRA) else 2
    refusals = find_refusals(layer)
    found = []
    for module, weights in weights_of:
        if weights is None:
            continue
        reason = refusals.get(module.rpartition(".")[2])
        if reason and weights.lora_b is not None and weights.lora_b.any():
            kind = type(getattr(layer, "base_layer", layer)).__name__
            found.append(f"module {module} (layer {name}, {kind}): {reason}")
            continue
        fault = (
            experts.find_stacked_fault(manager, module, weights, layer)
            if is_stacked
            else find_fault_of_pair(weights, dims)
        )
        faults = [fault] if fault else list(_find_faults_of_values(weights, max_rank))
        if copy_fault := find_copy_fault(manager.model, name, weights):
            faults.append(copy_fault)
        found += [f"module {module}: {fault}" for fault in faults]
    return found or list(_validate_shapes(manager, name, layer, weights_of))


def find_fault_of_pair(weights: Any, dims: int = 2) -> str:
    """Return the fault of one module's A and B that does not depend on their layer's sizes."""
    a, b = weights.lora_a, weights.lora_b
    if fault := find_pair_fault(a, b, dims=(2, 3)):
        return fault
    shapes = f"found LoRA-A {tuple(a.shape)} and LoRA-B {tuple(b.shape)}"
    if a.ndim != dims:
        return f"expected tensors of {dims} dimensions, {shapes}"
    if a.shape[-2] != weights.rank:
        return f"adapter_config.json says rank {weights.rank}, {shapes}"
    return ""


def _find_faults_of_values(weights: Any, max_rank: int) -> Iterator[str]:
    """Yield a rank above the limit, and values that are not finite."""
    if fault := find_rank_fault(weights.rank, max_rank):
        yield fault
    # vLLM multiplies B by the scaling after it has loaded the adapter.
    for half, tensor, factor in (
        ("A", weights.lora_a, 1.0),
        ("B", weights.lora_b, weights.scaling),
    ):
        # One pass without a temporary: the extremes of a tensor with a NaN are NaN.
        if tensor.numel() and not all((x * factor).isfinite() for x in torch.aminmax(tensor)):
            yield f"LoRA-{half} times its scaling {factor} has NaN or infinity in {tensor.dtype}"


def _validate_shapes(
    manager: Any, name: str, layer: Any, weights_of: Sequence[tuple[str, Any]]
) -> Iterator[str]:
    """Yield the faults between a layer and its modules' pairs, each of which is sound."""
    if isinstance(layer, NWayLinearWithLoRA):
        try:
            layer.validate(
                [weights and weights.lora_a for _, weights in weights_of],
                [weights and weights.lora_b for _, weights in weights_of],
            )
        except LoRATensorError as error:
            yield str(error)
        return
    if isinstance(layer, FusedMoEWithLoRA):
        yield from experts.validate_experts(manager, name, layer, weights_of)
        return
    shapes = module_shapes(manager, name, layer, len(weights_of))
    for (module, weights), (columns, rows) in zip(weights_of, shapes, strict=False):
        if weights is None:
            continue
        if fault := find_shape_fault(weights.lora_a, weights.lora_b, columns, rows):
            kind = type(getattr(layer, "base_layer", layer)).__name__
            yield f"module {module} (layer {name}, {kind}): {fault}"


def module_shapes(
    manager: Any, name: str, layer: Any, modules: int
) -> Sequence[tuple[int | None, int | None]]:
    """Return per module of one of vLLM's own layers A's columns and B's rows over all ranks.

    None means unknown: a custom loader may change the number of rows. Empty if nothing is known.

    Args:
        manager: the rank's ``LoRAModelManager``.
        name: the layer's path in the model.
        layer: the LoRA layer.
        modules: the number of its modules.
    """
    return step5.module_shapes(manager.model, name, layer) or _sizes(layer, modules)


def _sizes(layer: Any, modules: int) -> Sequence[tuple[int | None, int | None]]:
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
    has_own_loader = isinstance(base, ColumnParallelLinear) and type(base).weight_loader not in (
        ColumnParallelLinear.weight_loader,
        MergedColumnParallelLinear.weight_loader,
        QKVParallelLinear.weight_loader,
    )
    if has_own_loader or len(rows) != modules:
        return [(base.input_size, None)] * modules
    return [(base.input_size, count) for count in rows]
