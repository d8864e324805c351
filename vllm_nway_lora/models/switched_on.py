# SPDX-License-Identifier: Apache-2.0
"""Switch LoRA on for a built model whose class lacks nothing but vLLM's flags for it.

The worker sets the flags on the instance before it wraps the model for LoRA. The class, the registry and
the quantisation do not change. Two constructors that assert that LoRA is off (Mamba 2, Zamba 2) are called
without the LoRA configuration.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.models.interfaces import SupportsLoRA, supports_multimodal
from vllm.model_executor.models.module_mapping import MultiModelKeys

from vllm_nway_lora.models import tables, traced_experts
from vllm_nway_lora.models.mapping import find_hidden_entries
from vllm_nway_lora.models.without_lora import SWITCHED_ON, is_listed
from vllm_nway_lora.rows.notes import add_refusals, get_notes

logger = logging.getLogger("vllm.nway_lora")

#: The modules of a checkpoint that the usual fused projections stand for. Any other one stands for
#: itself, unless a class says otherwise. The trace shows whether that is right, and what is not traced
#: is refused.
_USUAL: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

#: The attributes of vLLM's ``SupportsLoRA``, 0.17.0 to 0.33.0, with its defaults. The towers of a
#: multimodal model do not take LoRA.
_FLAGS: Mapping[str, Callable[[], Any]] = {
    "supports_lora": lambda: True,
    "is_3d_moe_weight": lambda: False,
    "is_non_gated_moe": lambda: False,
    "embedding_modules": dict,
    "lora_skip_prefixes": list,
    "lora_manager": lambda: None,
    "supports_tower_connector_lora": lambda: False,
}
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_MARK = "_nway_lora_switched_on"
_UNTRACED = "the places of its rows in this model could not be traced"


def load_lora_model(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    """Switch LoRA on, then wrap the model; wraps ``LoRAModelRunnerMixin.load_lora_model``."""
    model, vllm_config = (
        args[place] if len(args) > place else kwargs[name]
        for place, name in enumerate(("model", "vllm_config"))
    )
    switch_on(model, vllm_config)
    return wrapped(*args, **kwargs)


def build_without_lora(wrapped: Callable[..., None], _: Any, args: Any, kwargs: Any) -> None:
    """Build a model as if LoRA were off; wraps constructors that only assert that it is."""
    vllm_config = args[0] if args else kwargs["vllm_config"]
    lora_config, vllm_config.lora_config = vllm_config.lora_config, None
    try:
        wrapped(*args, **kwargs)
    finally:
        vllm_config.lora_config = lora_config


def switch_on(model: Any, vllm_config: Any) -> None:
    """Set the flags of vLLM's ``SupportsLoRA`` on a model of a listed class.

    Where LoRA on it would not be exact, the model stays as it is, and vLLM refuses it.
    """
    kind = type(model)
    if not is_listed(kind.__module__, kind.__name__) or isinstance(model, SupportsLoRA):
        return
    is_wrapper = supports_multimodal(model) and not hasattr(model, "get_mm_mapping")
    language = _find_language_model(model) if is_wrapper else ""
    obstacle = ""
    if is_wrapper and not language:
        obstacle = "its language model is not known"
    elif is_wrapper and getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        obstacle = "LoRA is asked for on its towers too"
    elif vllm_config.cache_config.kv_sharing_fast_prefill:
        obstacle = "--kv-sharing-fast-prefill passes a part of the tokens to its last layers"
    if obstacle:
        logger.warning("vllm-nway-lora leaves %s without LoRA: %s.", kind.__name__, obstacle)
        return
    if is_wrapper:
        parts = {"language_model": language, "tower_model": _list_others(model, language)}
        model.get_mm_mapping = lambda: MultiModelKeys.from_string_field(**parts)
    for name, default in _FLAGS.items():
        if not getattr(model, name, None):
            setattr(model, name, default())
    model.packed_modules_mapping = _list_modules(model, SWITCHED_ON[kind.__name__])
    if not hasattr(model, "config"):  # vLLM passes it to each LoRA layer
        model.config = vllm_config.model_config.hf_config
    setattr(model, _MARK, True)


def _find_language_model(model: Any) -> str:
    """Return the path of a multimodal model's language model; empty if it names none."""
    try:
        language = model.get_language_model()
    except NotImplementedError:
        return ""
    return next((path for path, module in model.named_modules() if module is language), "")


def _list_others(model: nn.Module, language: str) -> list[str]:
    """Return the paths of all parts beside the language model: towers, projectors and the like."""
    others, parent = [], model
    steps = language.split(".")
    for depth, step in enumerate(steps):
        above = "".join(f"{name}." for name in steps[:depth])
        others += [above + name for name, _ in parent.named_children() if name != step]
        parent = parent.get_submodule(step)
    return others


def _list_modules(model: nn.Module, entries: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the modules of each layer with several outputs: ``packed_modules_mapping``."""
    own: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", None) or {}
    known = {**find_hidden_entries(model), **own, **entries}
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear)):
            known.setdefault(name, tables.UNLISTED.get(name) or _USUAL.get(name, (name,)))
    return {fused: list(modules) for fused, modules in known.items()}


def refuse_untraced(model: nn.Module, mapping: Mapping[str, Sequence[str]]) -> None:
    """Note refusals on the layers of a switched-on model that could not be traced.

    vLLM's own slices are not tested on these classes, because vLLM has no LoRA on them.

    Args:
        model: the built and traced model, not wrapped for LoRA yet.
        mapping: fused projection's name -> its adapter-visible modules.
    """
    if not getattr(model, _MARK, False):
        return
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        notes = get_notes(layer)
        if isinstance(layer, LinearBase) and notes.traced is None:
            add_refusals(layer, dict.fromkeys(mapping.get(name) or [name], _UNTRACED))
        elif notes.mixture is None and any(map(_EXPERT.search, mapping.get(name, ()))):
            kinds = dict.fromkeys(module.rpartition(".")[2] for module in mapping[name])
            traced_experts.refuse(layer, list(kinds), _UNTRACED)
