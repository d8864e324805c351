# SPDX-License-Identifier: Apache-2.0
"""Check an adapter's tensors by name and dtype: refuse those that vLLM would convert or drop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_nway_lora.adapters.errors import AdapterError

#: The ending of the base weight that PEFT saves beside the LoRA of an embedding or of lm_head.
_BASE_WEIGHT = ".base_layer.weight"

_COPY = "_nway_lora_base_weight"

#: The number of rows that are compared at a time.
_ROWS = 4096


def validate_tensors(wrapped: Any, _model_class: Any, args: Any, kwargs: Any) -> Any:
    """Refuse tensors that vLLM would convert or drop; wraps ``LoRAModel.from_lora_tensors``.

    A base weight stays with its module's ``LoRALayerWeights`` for :func:`find_copy_fault`.

    Raises:
        AdapterError: a tensor is not of a floating-point type, a tensor is a LoRA bias (vLLM 0.31.0
            uses it as LoRA-B, vllm/lora/utils.py), two tensors have the same place, or a base weight
            is that of a module without LoRA.
    """
    tensors = kwargs["tensors"] if "tensors" in kwargs else args[1]
    for name in tensors:
        if name.endswith((".lora_A.bias", ".lora_B.bias")):
            raise AdapterError(
                f"tensor {name} is a LoRA bias, which vLLM does not support. Train the adapter without "
                "lora_bias"
            )
    adapter = wrapped(*args, **kwargs)
    mapper, helper = kwargs.get("weights_mapper"), kwargs.get("peft_helper")
    saved_whole = getattr(helper, "modules_to_save", None) or ()
    skipped = kwargs.get("skip_prefixes") or ()
    places: dict[tuple[str, bool], str] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {name} is {tensor.dtype}, not a floating-point type")
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
    return adapter


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
