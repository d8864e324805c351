# SPDX-License-Identifier: Apache-2.0
"""The names that transformers 5 gives a model's modules, where a checkpoint's names differ.

PEFT saves an adapter under the names of transformers' modules. vLLM maps the names of checkpoints.
transformers knows the difference (``transformers/conversion_mapping.py``, 5.0 and later).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.config import get_current_vllm_config_or_none

#: The names that multimodal classes of transformers give to parts with classes of their own.
_TOWERS = ("vision_tower", "vision_model", "audio_tower")

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
    yield from _read_towers(config)


def _read_towers(config: Any) -> Iterator[Sequence[Any]]:
    """Yield the renames of a model's towers: transformers applies those of a tower's class below it."""
    from transformers import PretrainedConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for field, part in getattr(config, "__dict__", {}).items():
        if field == "text_config" or not isinstance(part, PretrainedConfig):
            continue
        names = MODEL_MAPPING_NAMES.get(part.model_type) or ()
        for name, tower in itertools.product([names] if isinstance(names, str) else names, _TOWERS):
            mapping = get_checkpoint_conversion_mapping(name) or []  # a copy for each tower
            if mapping and all(hasattr(step, "scope_prefix") for step in mapping):
                for step in mapping:
                    step.scope_prefix, step.base_model_prefix = tower, "model"
                yield mapping
