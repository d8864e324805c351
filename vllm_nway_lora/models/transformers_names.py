# SPDX-License-Identifier: Apache-2.0
"""The names that transformers 5 gives a model's modules, where a checkpoint's names differ.

PEFT saves an adapter under the names of transformers' modules. vLLM maps the names of checkpoints.
transformers knows the difference (``transformers/conversion_mapping.py``, 5.0 and later).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm.config import get_current_vllm_config_or_none

_CONFIG = "_nway_lora_hf_config"


def note_config(model: Any) -> None:
    """Note the configuration of the whole checkpoint on ``model``, whose own can be its text model's."""
    vllm_config = get_current_vllm_config_or_none()
    model_config = getattr(vllm_config, "model_config", None)
    setattr(model, _CONFIG, getattr(model_config, "hf_config", None))


class Conversion:
    """The renames that transformers applies to a model's checkpoint when it loads it."""

    def __init__(self, model: Any) -> None:
        """Read the renames of ``model``'s checkpoint, and of its text model."""
        config = getattr(model, _CONFIG, None) or getattr(model, "config", None)
        #: The renames of each part of the model, in the order in which transformers applies them.
        self.renames = [
            # The others change tensors too.
            [step for step in mapping if not hasattr(step, "operations")]
            for mapping in _read_mappings(config)
        ]

    def rename(self, name: str) -> Iterator[str]:
        """Yield the names that transformers gives to a checkpoint's module, where they differ.

        Args:
            name: the module's name in a checkpoint, without ``.weight``.
        """
        for mapping in self.renames:
            renamed = f"{name}.weight"
            for step in mapping:
                renamed = step.rename_source_key(renamed)[0]
            if renamed != f"{name}.weight":
                yield renamed.removesuffix(".weight")


def _read_mappings(config: Any) -> Iterator[Sequence[Any]]:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers 4 has the checkpoints' names
        return
    text = getattr(config, "get_text_config", lambda: config)()
    for part in (config, text):
        names = [*(getattr(part, "architectures", None) or ()), getattr(part, "model_type", None)]
        for name in filter(None, names):
            if mapping := get_checkpoint_conversion_mapping(name):
                yield mapping
                break
