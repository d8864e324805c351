# SPDX-License-Identifier: Apache-2.0
"""The options of ``vllm serve`` that change how an adapter is served.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UsageError(ValueError):
    """A model, an adapter or an option that cannot be examined; the text is one line."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of ``vllm serve``, by their names there.

    Attributes:
        tensor_parallel_size: ``--tensor-parallel-size``.
        fully_sharded_loras: ``--fully-sharded-loras``.
        max_lora_rank: ``--max-lora-rank``; None for the smallest value that is enough.
        model_impl: ``--model-impl``.
        lora_target_modules: ``--lora-target-modules`` (from 0.19.0 on); None for every module.
        enable_tower_connector_lora: ``--enable-tower-connector-lora``.
        enable_mixed_moe_lora_format: ``--enable-mixed-moe-lora-format`` (from 0.24.0 on).
        trust_remote_code: ``--trust-remote-code``.
        hf_overrides: ``--hf-overrides``: settings that replace those of ``config.json``.
    """

    tensor_parallel_size: int = 1
    fully_sharded_loras: bool = False
    max_lora_rank: int | None = None
    model_impl: str = "auto"
    lora_target_modules: tuple[str, ...] | None = None
    enable_tower_connector_lora: bool = False
    enable_mixed_moe_lora_format: bool = False
    trust_remote_code: bool = False
    hf_overrides: Mapping[str, Any] | None = None
