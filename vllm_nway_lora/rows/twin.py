# SPDX-License-Identifier: Apache-2.0
"""Build the twin of a model: its class once more, for this rank, without memory or quantisation."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm.config import set_current_vllm_config

_EXPERT_MAP = "determine_expert_map"


def build_twin(model: nn.Module, vllm_config: Any) -> nn.Module:
    """Build the class of ``model`` on the meta device; leave ``model`` and its configuration alone.

    Args:
        model: the served model.
        vllm_config: its configuration.

    Raises:
        Exception: whatever the model's constructor raises.
    """
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model

    config = _copy_config(vllm_config)
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        # It keeps rotary embeddings for other models of the process; those of the twin have no memory.
        stack.enter_context(mock.patch.dict(rotary_embedding._ROPE_DICT))
        stack.enter_context(set_current_vllm_config(config))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_StayOnMeta())
        for module, name in _find_expert_maps():
            stack.enter_context(mock.patch.object(module, name, _on_cpu(getattr(module, name))))
        return initialize_model(vllm_config=config, model_class=type(model))


class _StayOnMeta(TorchFunctionMode):
    """Keep tensors without memory where they are: some constructors move a part to the device."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and args[0].is_meta:
            args = tuple("meta" if isinstance(a, (str, torch.device)) else a for a in args)
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _find_expert_maps() -> Iterator[tuple[Any, str]]:
    """Yield where vLLM's function is that finds the experts of a rank under expert parallelism."""
    package = "vllm.model_executor.layers.fused_moe"
    for part in ("layer", "expert_map_manager"):  # until 0.20.2, or later
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{package}.{part}")
            if hasattr(module, _EXPERT_MAP):
                yield module, _EXPERT_MAP


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, whose tensors have values: constructors and loaders read those of the map."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def _copy_config(vllm_config: Any) -> Any:
    """Return a copy whose parts a constructor can change: the registries of layers, the model's config."""
    config = copy.copy(vllm_config)
    compilation = config.compilation_config = copy.copy(vllm_config.compilation_config)
    for name, value in vars(compilation).items():
        if isinstance(value, (dict, list, set)):
            setattr(compilation, name, copy.copy(value))
    # Attention layers and experts register by name, and twice is an error.
    compilation.static_forward_context = {}
    compilation.static_all_moe_layers = []
    compilation.mode = type(compilation.mode or 0)(0)
    model = config.model_config = copy.copy(vllm_config.model_config)
    model.hf_config, model.hf_text_config = copy.deepcopy(
        (vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config)
    )
    config.quant_config = None
    return config
