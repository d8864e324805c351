# SPDX-License-Identifier: Apache-2.0
"""Translate an adapter's tensors for a model without serving it: the function for trainers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

import vllm_nway_lora
from vllm_nway_lora.adapters.admission import format_refusal, translate_and_examine
from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.forms import PREFIX
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.adapters.variants import MAX_RANK
from vllm_nway_lora.compat import registration
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.models.names import checkpoint_names, rename_mapper


class Translation(dict[str, torch.Tensor]):
    """The tensors of a translated adapter by their names under PEFT.

    Attributes:
        config: the adapter_config.json that belongs to them.
        rules: what was translated, as phrases; empty if nothing was.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], rules: tuple[str, ...]
    ) -> None:
        super().__init__(tensors)
        self.config, self.rules = config, rules


def translate_tensors(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    model: str,
    *,
    model_impl: str = "auto",
) -> Translation:
    """Implement :func:`vllm_nway_lora.translate`."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("tensors: give a torch.Tensor for every name")
    was_on = bool(registration.applied())
    vllm_nway_lora.register()
    if not registration.applied():
        raise RuntimeError("vllm-nway-lora is off in this process: see `vllm-nway-lora doctor`")
    try:
        rank = offline.configure(
            model, 0, ServerOptions(max_lora_rank=MAX_RANK, model_impl=model_impl)
        )
        offline.build(rank)
        rank.wrap()
        with rank.current():
            return _translate(tensors, config, rank.lora_manager)
    finally:
        if not was_on:
            vllm_nway_lora.unregister()


def _translate(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], manager: Any
) -> Translation:
    adapter = LoRAModel.from_lora_tensors(
        1,
        dict(tensors),
        PEFTHelper.from_dict(dict(config)),
        device="cpu",
        weights_mapper=rename_mapper(manager.model),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    findings, fault = translate_and_examine(manager, adapter)
    faults = [fault] if fault else [*findings.faults, *findings.unmatched]
    if faults:
        raise AdapterError(format_refusal("The adapter", faults))
    origin = get_origin(adapter)
    rules = origin.rules
    if not all(name.startswith(PREFIX) for name in tensors):
        rules += (f"{PREFIX} put before every name",)
    if not rules:
        return Translation(tensors, dict(config), ())
    found: dict[str, torch.Tensor] = {}
    names: dict[str, Any] = {}
    embeddings = getattr(manager.model, "embedding_modules", None) or {}
    for path, weights in adapter.loras.items():
        name = next(iter(checkpoint_names(manager.model, path)), path)
        is_embedding = embeddings.get(path.rpartition(".")[2]) == "input_embeddings"
        ends = ("_embedding_A", "_embedding_B") if is_embedding else ("_A.weight", "_B.weight")
        for end, half in zip(ends, (weights.lora_a, weights.lora_b), strict=True):
            found[f"{PREFIX}{name}.lora{end}"] = half
        names[name] = weights
    return Translation(found, _build_config(origin.config, names), rules)


def _build_config(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of plain LoRA whose ranks and scalings are those of the modules."""
    [(rank, _)] = Counter(weights.rank for weights in names.values()).most_common(1)
    scaling = next(w.scaling for w in names.values() if w.rank == rank)
    built = {
        key: config[key]
        for key in ("base_model_name_or_path", "task_type")
        if config.get(key) is not None
    }
    # PEFT reaches the parameters of stacked experts by their own setting.
    if any(name.endswith(".experts.base_layer") for name in names):
        built["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    modules = [name for name in names if not re.search(r"\.experts(\.base_layer)?$", name)]
    built |= {
        "peft_type": "LORA",
        "bias": "none",
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for name, weights in names.items():
        # PEFT's patterns are for the parameters of stacked experts, not for its modules.
        name = re.sub(r"\.experts\.base_layer$", ".experts.gate_up_proj", name)
        name = re.sub(r"\.experts$", ".experts.down_proj", name)
        if (weights.rank, weights.scaling) != (rank, scaling):
            built["rank_pattern"][re.escape(name)] = weights.rank
            built["alpha_pattern"][re.escape(name)] = weights.scaling * weights.rank
    return built
