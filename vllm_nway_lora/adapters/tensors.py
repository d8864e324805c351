# SPDX-License-Identifier: Apache-2.0
"""Read an adapter's tensors: in any form, and refuse those that vLLM would convert or drop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_nway_lora.adapters.config import find_rank_and_scaling, get_config, ignores_patterns
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.forms import read_forms, split
from vllm_nway_lora.adapters.origin import Origin, set_origin
from vllm_nway_lora.adapters.variants import fold

#: The ending of the base weight that PEFT saves beside the LoRA of an embedding or of lm_head.
_BASE_WEIGHT = ".base_layer.weight"

_COPY = "_nway_lora_base_weight"

#: The number of rows that are compared at a time.
_ROWS = 4096


def validate_tensors(wrapped: Any, _model_class: Any, args: Any, kwargs: Any) -> Any:
    """Read tensors in any form, and refuse those that vLLM would convert or drop.

    Wraps ``LoRAModel.from_lora_tensors``. The adapter keeps its :class:`Origin`. A base weight stays
    with its module's ``LoRALayerWeights`` for :func:`find_copy_fault`.

    Raises:
        AdapterError: a tensor is not of a floating-point type, a tensor is a LoRA bias (vLLM 0.31.0
            uses it as LoRA-B, vllm/lora/utils.py), two tensors have the same place, a base weight is
            that of a module without LoRA, or the tensors have no exact translation.
    """
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    helper, mapper = given["peft_helper"], given.get("weights_mapper")
    config = get_config(helper)
    forms = read_forms(given["tensors"])
    for name, tensor in forms.tensors.items():
        if name.endswith((".lora_A.bias", ".lora_B.bias")):
            raise AdapterError(
                f"tensor {name} is a LoRA bias, which vLLM does not support. Train the adapter without "
                "lora_bias"
            )
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {name} is {tensor.dtype}, not a floating-point type")
    folded = fold(forms.tensors, config)
    tensors = folded.tensors
    adapter = wrapped(**{**given, "tensors": tensors})
    saved_whole = getattr(helper, "modules_to_save", None) or ()
    skipped = given.get("skip_prefixes") or ()
    places: dict[tuple[str, bool], str] = {}
    for name, tensor in tensors.items():
        try:
            place = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            # `from_lora_tensors` drops this tensor; it has refused all other bad names above.
            is_elsewhere = any(f".{part}" in name or name.startswith(part) for part in skipped)
            if not is_elsewhere and name.split(".")[-2] not in saved_whole:
                _keep_copy(adapter, name, tensor, mapper)
            continue
        if place[0] not in saved_whole and places.setdefault(place, name) != name:
            raise AdapterError(
                f"tensors {places[place]} and {name} are both LoRA-{'A' if place[1] else 'B'} of "
                f"module {place[0]}"
            )
    modules = {path: split(name)[0] for (path, _), name in places.items() if path in adapter.loras}
    scalings = {**forms.scalings, **folded.scalings}
    rules = (*forms.rules, *folded.rules, *_set_scalings(adapter, helper, modules, scalings))
    names = {path: forms.modules.get(module, module) for path, module in modules.items()}
    set_origin(adapter, Origin(config, names, rules))
    return adapter


def _set_scalings(
    adapter: Any, helper: Any, modules: Mapping[str, str], scalings: Mapping[str, float]
) -> tuple[str, ...]:
    """Set the rank and the scaling of each module that vLLM gives another one; return the rules.

    Args:
        adapter: the ``LoRAModel``.
        helper: the ``PEFTHelper``.
        modules: module's path in vLLM's model -> its name under PEFT.
        scalings: module's name under PEFT -> its scaling, where the tensors have given it one.
    """
    has_patterns = ignores_patterns(helper)
    for path, module in modules.items():
        weights = adapter.loras[path]
        if module in scalings:
            if weights.lora_a is None:  # refused later
                continue
            rank, scaling = weights.lora_a.shape[-2], scalings[module]
        elif has_patterns:
            rank, scaling = find_rank_and_scaling(get_config(helper), module)
        else:
            continue
        # Until 0.29.0 `pack_moe` (vllm/lora/lora_weights.py) uses lora_alpha / rank.
        weights.rank, weights.scaling, weights.lora_alpha = rank, scaling, scaling * rank
        adapter.rank = max(adapter.rank, rank)
    return ("rank_pattern and alpha_pattern applied to each module",) if has_patterns else ()


def _keep_copy(adapter: Any, name: str, tensor: torch.Tensor, mapper: Any) -> None:
    """Keep a base weight until the model's own is known."""
    lora_a = f"{name.removesuffix(_BASE_WEIGHT)}.lora_A.weight"
    weights = adapter.loras.get(parse_fine_tuned_lora_name(lora_a, mapper)[0])
    if weights is None or not name.endswith(_BASE_WEIGHT):
        raise AdapterError(
            f"tensor {name} {tuple(tensor.shape)} is not a LoRA tensor, and vLLM would ignore it. "
            "Merge it into the model, and train the adapter on that model"
        )
    setattr(weights, _COPY, (name, tensor))


def carry_copy(old: Any, new: Any) -> None:
    """Give the base weight that an adapter has of a module to the module's translated weights."""
    if hasattr(old, _COPY):
        setattr(new, _COPY, getattr(old, _COPY))


def find_copy_fault(model: nn.Module, path: str, weights: Any) -> str:
    """Return the fault of the base weight that an adapter has of a module, if it is not the model's.

    PEFT saves the weight ``(rows, columns)`` of an embedding or of lm_head whenever it has LoRA. It is
    changed if it was trained too, or if tokens were added.

    Args:
        model: this rank's model.
        path: the path of the module's layer.
        weights: the module's ``LoRALayerWeights``.
    """
    name, copy = getattr(weights, _COPY, ("", None))
    if copy is None:
        return ""
    layer: Any = model.get_submodule(path)
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, VocabParallelEmbedding):  # lm_head's class is a subclass
        return ""
    shape = (layer.org_vocab_size, layer.embedding_dim)
    if tuple(copy.shape) == shape and _equals_weight(layer, copy):
        delattr(weights, _COPY)
        return ""
    return (
        f"tensor {name} {tuple(copy.shape)} differs from the model's own weight {shape}, and vLLM "
        "would ignore it. Serve a model that has this weight (PEFT's get_base_model), or train the "
        "adapter with the model's own embeddings"
    )


def _equals_weight(layer: Any, copy: torch.Tensor) -> bool:
    """Return whether ``copy`` has the values of a layer's weight, as far as this rank has them.

    A weight that is quantised, packed for a kernel or without memory cannot be compared: True.
    """
    shard = layer.shard_indices
    copy = copy[shard.org_vocab_start_index : shard.org_vocab_end_index]
    weight = getattr(layer, "weight", None)
    if (
        weight is None
        or weight.is_meta
        or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or weight.ndim != 2
        or weight.shape[0] < copy.shape[0]
        or weight.shape[1] != copy.shape[1]
    ):
        return True
    # The file may be of the precision of training, the model of that of serving.
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (copy, weight))
    smallest = torch.finfo(torch.float16).smallest_normal
    return all(
        torch.allclose(
            weight[start : start + len(rows)].detach().cpu().float(),
            rows.cpu().float(),
            rtol=precision,
            atol=smallest * precision,
        )
        for start, rows in zip(range(0, len(copy), _ROWS), copy.split(_ROWS), strict=True)
    )
