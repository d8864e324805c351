# SPDX-License-Identifier: Apache-2.0
"""Check an adapter's tensors by name and dtype: refuse those that vLLM would convert or drop."""

from __future__ import annotations

from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name

from vllm_nway_lora.adapters.errors import AdapterError


def validate_tensors(wrapped: Any, _model_class: Any, args: Any, kwargs: Any) -> Any:
    """Refuse tensors that vLLM would convert or drop; wraps ``LoRAModel.from_lora_tensors``.

    Raises:
        AdapterError: a tensor is not of a floating-point type, a tensor is a LoRA bias (vLLM 0.31.0
            uses it as LoRA-B, vllm/lora/utils.py), or two tensors have the same place.
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
    places: dict[tuple[str, bool], str] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor {name} is {tensor.dtype}, not a floating-point type")
        try:
            place = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            continue  # `from_lora_tensors` skips this name; it has refused all other bad names above
        if place[0] not in saved_whole and places.setdefault(place, name) != name:
            raise AdapterError(
                f"tensors {places[place]} and {name} are both LoRA-{'A' if place[1] else 'B'} of "
                f"module {place[0]}"
            )
    return adapter
