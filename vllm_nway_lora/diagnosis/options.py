# SPDX-License-Identifier: Apache-2.0
"""The folders and the options of ``vllm serve`` that ``check`` and ``plan`` take.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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


def validate_files(model: str, adapter: str | None) -> None:
    """Check the files that the answer needs. vLLM, whose import takes seconds, is not needed for it.

    Raises:
        UsageError: a folder or a file is missing, or has no JSON.
    """
    for folder, file in ((model, "config.json"), (adapter, "adapter_config.json")):
        if folder is None:
            continue
        path = Path(folder, file)
        if not path.is_file():
            raise UsageError(_explain_missing(folder, file))
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(f"{path} is not a JSON object")


def _explain_missing(folder: str, file: str) -> str:
    if Path(folder).exists():
        return f"{folder} has no {file}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        return (
            f"there is no folder {folder}. If it is a repository of the hub, download it with "
            f"`hf download {folder} --include '*.json' '*.py' 'adapter_model*'` and pass the folder that "
            "this prints"
        )
    return f"there is no folder {folder}"
