# SPDX-License-Identifier: Apache-2.0
"""Adapters on mixtures of experts: their modules, and the faults that vLLM does not report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import vllm
from torch import nn
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

from vllm_nway_lora.compat import defects
from vllm_nway_lora.rows.pairs import find_pair_fault, find_shape_fault

#: A kernel pads hidden sizes to a multiple of this at most (mxfp4 of GPT-OSS).
_LARGEST_PADDING = 256

_SWAPPED = (
    ". Columns and rows are swapped, as PEFT 0.18 and older write them: transpose each expert's "
    "LoRA-A and LoRA-B into each other, or train the adapter with a later PEFT"
)


class Sizes(NamedTuple):
    """The sizes of a mixture's weights in the checkpoint, over all ranks and without padding.

    Attributes:
        experts: the number of experts.
        hidden: the columns of gate_proj and up_proj, the rows of down_proj.
        intermediate: the rows of gate_proj and of up_proj, the columns of down_proj.
    """

    experts: int
    hidden: int
    intermediate: int


def read_sizes(manager: Any, layer: Any) -> Sizes:
    """Return the sizes of a mixture, given its LoRA layer."""
    config = getattr(getattr(layer, "base_layer", None), "moe_config", None)
    allocated: int = layer.w13_lora_a_stacked[0].shape[-1]
    hidden: int | None = getattr(config, "hidden_dim_unpadded", None)
    if hidden is None:  # 0.17.1 keeps the padded size only
        model_config = getattr(manager.model, "config", None)
        hidden = getattr(model_config, "hidden_size", allocated)
        is_padding = 0 <= allocated - hidden < _LARGEST_PADDING
        hidden = hidden if is_padding else allocated  # experts can have a width of their own
    local: int = layer.w13_lora_b_stacked[0].shape[1]
    # 0.20.2 has no expert parallelism with LoRA, and no number of experts over all ranks.
    experts: int = getattr(layer, "global_num_experts", local)
    return Sizes(experts, hidden, _rows_per_rank(layer) * layer.tp_size)


def _rows_per_rank(layer: Any) -> int:
    """Return the intermediate size of one tensor-parallel rank, without padding."""
    config = getattr(getattr(layer, "base_layer", None), "moe_config", None)
    size: int | None = getattr(config, "intermediate_size_per_partition_unpadded", None)
    if size is None:  # 0.17.1 pads the layer's attribute, not that of its config
        size = getattr(config, "intermediate_size_per_partition", None)
    return size or int(layer.w2_lora_a_stacked[0].shape[-1])


def stacked_modules(manager: Any, adapter: Any, name: str, layer: nn.Module) -> list[str]:
    """Return the two modules of a mixture whose experts are stacked in one tensor; else nothing.

    The module ``experts`` is down_proj, ``experts.base_layer`` is gate_up_proj.
    """
    is_mixed_format = (
        isinstance(layer, FusedMoEWithLoRA)
        and getattr(manager, "_enable_mixed_moe_lora_format", False)
        and getattr(adapter, "is_3d_lora_weight", False)
    )
    if isinstance(layer, FusedMoE3DWithLoRA) or is_mixed_format:
        return [name, f"{name}.base_layer"]
    return []


def find_stacked_fault(manager: Any, module: str, weights: Any, layer: Any) -> str:
    """Return the fault of a module that has the tensors of all experts; empty if there is none.

    vLLM (0.17.0 to 0.33.0) reshapes A to ``(experts, r, columns)`` and B to ``(rows, r, experts)``
    (``_stack_moe_lora_weights``, vllm/lora/model_manager.py). Files have these shapes, or two
    dimensions. The order of the experts and ranks in B's columns cannot be told from shapes.
    """
    a, b, rank = weights.lora_a, weights.lora_b, weights.rank
    if a is None or b is None or not a.ndim or not b.ndim:
        return find_pair_fault(a, b, dims=(2, 3))
    n, hidden, intermediate = read_sizes(manager, layer)
    is_gate_up = module.endswith(".base_layer")
    columns, rows = (hidden, 2 * intermediate) if is_gate_up else (intermediate, hidden)
    flat = ((n * rank, columns), (rows, n * rank))
    deep = ((n, rank, columns), (rows, rank, n))
    found = (tuple(a.shape), tuple(b.shape))
    if found in (flat, deep):
        return ""
    # One of both modules always tells: gate_up is square if 2I == H, down if I == H.
    is_swapped = columns != rows and (a.shape[-1], b.shape[0]) == (rows, columns)
    return (
        f"it is {'gate_up_proj' if is_gate_up else 'down_proj'} of {type(layer).__name__}: expected "
        f"the LoRA-A and LoRA-B of {n} experts of rank {rank}, {flat[0]} and {flat[1]}, or {deep[0]} "
        f"and {deep[1]}, found {found[0]} and {found[1]}{_SWAPPED if is_swapped else ''}"
    )


def validate_experts(
    manager: Any, name: str, layer: Any, weights_of: Sequence[tuple[str, Any]]
) -> Iterator[str]:
    """Yield the faults of a mixture's modules, each of which has a sound pair.

    vLLM needs every module of every local expert, all with the same shapes.
    """
    by_module = dict(weights_of)
    local = list(by_module)
    is_stacked = f"{name}.base_layer" in by_module
    if not is_stacked and hasattr(manager, "_restrict_to_local_experts"):  # from 0.22.0 on
        local = manager._restrict_to_local_experts(name, local)
    missing = [module for module in local if by_module[module] is None]
    if missing and len(missing) < len(local):
        yield (
            f"layer {name}: all {len(local)} modules of its experts are needed, {len(missing)} are "
            f"missing, such as {missing[0]}"
        )
    if missing:
        return
    if fault := _find_padding_fault(layer):
        yield f"layer {name}: {fault}"
    # An expert's modules are gate (w1), down (w2), up (w3), or up and down without a gate.
    kinds = 2 if is_stacked or manager._is_non_gated_moe else 3
    first_down = 0 if is_stacked else 1
    for kind in range(kinds):
        modules = {module: by_module[module] for module in local[kind::kinds]}
        is_down = kind == first_down
        if not is_stacked:
            yield from _validate_expert_modules(manager, name, layer, modules, is_down)
        if not is_down:
            yield from _validate_division_of_ranks(layer, modules)


def _validate_expert_modules(
    manager: Any, name: str, layer: Any, modules: dict[str, Any], is_down: bool
) -> Iterator[str]:
    """Yield the faults of one projection of all local experts: A ``(r, columns)``, B ``(rows, r)``.

    ``--enable-moe-shared-loras`` has one module for all experts, whose tensors have one dimension
    more: 1 for the matrix at the hidden side, which all experts share, or the number of experts.
    """
    is_shared = getattr(manager, "_enable_moe_shared_loras", False)
    experts, hidden, intermediate = read_sizes(manager, layer)
    columns, rows = (intermediate, hidden) if is_down else (hidden, intermediate)
    is_scaled_alike = not is_shared and defects.find("experts-without-rslora").affects(
        vllm.__version__
    )
    kind = type(layer).__name__
    fits = True
    for module, weights in modules.items():
        a, b, fault = weights.lora_a, weights.lora_b, ""
        if is_shared:
            fault = _find_fault_of_copies(*((b, a) if is_down else (a, b)), experts)
        if not fault:
            one = (a[0], b[0]) if is_shared else (a, b)
            fault = find_shape_fault(*one, columns, rows)
        alike = weights.lora_alpha / weights.rank
        if not fault and is_scaled_alike and not math.isclose(weights.scaling, alike):
            fault = (
                f"its scaling is {weights.scaling:.6g}, as with use_rslora, and this release of vLLM "
                f"scales experts by lora_alpha / r = {alike:.6g}. Use a later vLLM, or save the adapter "
                "without use_rslora and with lora_alpha times the square root of r"
            )
        if fault:
            fits = False
            yield f"module {module} (layer {name}, {kind}): {fault}"
    ranks = {weights.lora_a.shape[-2] for weights in modules.values()}
    if fits and len(ranks) > 1:
        yield f"layer {name}: its experts have different ranks: {sorted(ranks)}"


def _find_fault_of_copies(shared: torch.Tensor, own: torch.Tensor, experts: int) -> str:
    """Return the fault of the experts' number in a module's two tensors.

    vLLM uses the first copy of a matrix that all experts share.
    """
    if own.shape[0] != experts or shared.shape[0] not in (1, experts):
        return (
            f"expected ({experts}, ...) for the matrices of {experts} experts and (1, ...) for the "
            f"one that they share, found {tuple(own.shape)} and {tuple(shared.shape)}"
        )
    if not bool((shared == shared[:1]).all()):
        return f"the {experts} copies of the matrix that its experts share differ"
    return ""


def _validate_division_of_ranks(layer: Any, modules: dict[str, Any]) -> Iterator[str]:
    """Yield the ranks that ``--fully-sharded-loras`` cannot divide (``_slice_w13_a``)."""
    if not layer.fully_sharded:
        return
    for module, weights in modules.items():
        if weights.rank % layer.tp_size:
            yield (
                f"module {module}: --fully-sharded-loras divides its rank {weights.rank} by "
                f"{layer.tp_size} tensor-parallel ranks"
            )


def _find_padding_fault(layer: Any) -> str:
    """Return the fault of a layer whose kernel pads the intermediate size, if vLLM misplaces rows.

    The weight of up_proj begins after the padding of gate_proj, and a rank's rows are cut from the
    checkpoint without padding. ``_slice_w13_b`` of 0.33.0 does the same with more than one rank;
    before, it cuts a rank's rows at the padded size. With one rank no release moves up_proj.
    """
    allocated, rows = layer.w2_lora_a_stacked[0].shape[-1], _rows_per_rank(layer)
    if allocated == rows:
        return ""
    if layer.tp_size > 1:
        is_misplaced = not hasattr(layer, "_tp_shard_size")
    else:
        is_interleaved = getattr(layer, "_base_model", "") == "GptOssForCausalLM"
        is_misplaced = isinstance(layer, FusedMoE3DWithLoRA) and not is_interleaved
    return (
        f"its kernel pads {rows} intermediate columns to {allocated}, and vLLM would put LoRA's rows "
        "in other places than the weight's. Choose another --moe-backend, or other tensor parallelism"
        if is_misplaced
        else ""
    )
