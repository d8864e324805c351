# SPDX-License-Identifier: Apache-2.0
"""Build the twin of a model: its class once more, for this rank, without memory or quantisation."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.config import set_current_vllm_config


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

    config = copy.copy(vllm_config)
    # Attention layers register in it by name, and twice is an error.
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.mode = type(config.compilation_config.mode or 0)(0)
    config.quant_config = None
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        # It keeps rotary embeddings for other models of the process; those of the twin have no memory.
        stack.enter_context(mock.patch.dict(rotary_embedding._ROPE_DICT))
        stack.enter_context(set_current_vllm_config(config))
        stack.enter_context(torch.device("meta"))
        return initialize_model(vllm_config=config, model_class=type(model))
