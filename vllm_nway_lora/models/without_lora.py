# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes without ``SupportsLoRA`` that need only flags for it, as data.

``ci/audit.py`` shows that each fused projection of these is exact by trace. Nothing of vLLM is imported
here, because a server reads its configuration before it imports model code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Classes of which a fused projection's modules follow from its name.
_PLAIN = (
    *("BailingMoeV25ForCausalLM", "Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration"),
    *("DbrxForCausalLM", "FalconForCausalLM"),
    *("GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM"),
    *("Gemma3nForConditionalGeneration", "IQuestLoopCoderForCausalLM"),
    *("KimiK25ForConditionalGeneration", "KimiLinearForCausalLM"),
    "KimiVLForConditionalGeneration",
    *("LlavaOnevisionForConditionalGeneration", "PaddleOCRVLForConditionalGeneration"),
    "Qwen2AudioForConditionalGeneration",
    *("Mamba2ForCausalLM", "MambaForCausalLM", "MiMoV2FlashForCausalLM"),
    *("OrionForCausalLM", "StablelmForCausalLM", "Step3p5ForCausalLM"),
)

#: Class -> fused projection -> its modules, where these do not follow from its name.
SWITCHED_ON: Mapping[str, Mapping[str, Sequence[str]]] = {
    **{name: {} for name in _PLAIN},
    # One module in a checkpoint too.
    "HrmTextForCausalLM": {"gate_up_proj": ("gate_up_proj",)},
    "Zamba2ForCausalLM": {"gate_up_proj": ("gate_up_proj",)},
}

#: Classes whose checkpoints store the weights of transformers' ``Conv1D``, input by output.
TRANSPOSED = frozenset({"GPT2LMHeadModel"})


def is_listed(module: str, name: str) -> bool:
    """Return whether a class is one of vLLM's own in :data:`SWITCHED_ON`.

    Args:
        module: the full name of its module.
        name: its own name.
    """
    return module.startswith("vllm.") and name in SWITCHED_ON


def is_lora_supported(original: property) -> property:
    """Return a property for ``ModelConfig.is_lora_supported`` that is also True for these classes."""

    def read(model_config: Any) -> bool:
        return bool(original.__get__(model_config)) or _is_served_by_listed(model_config)

    return property(read, doc=original.__doc__)


def _is_served_by_listed(model_config: Any) -> bool:
    if model_config.convert_type != "none":  # vLLM then builds another class, for pooling
        return False
    # Another package can have registered a class of its own for the architecture.
    entry = model_config.registry.models.get(model_config.architecture)
    return is_listed(*name_class(entry))


def name_class(entry: Any) -> tuple[str, str]:
    """Return the module and the name of the class of an entry in vLLM's registry of models.

    Two empty strings if there is no entry. The class is not imported.
    """
    loaded = getattr(entry, "model_cls", None)
    if loaded is not None:
        return loaded.__module__, loaded.__name__
    return getattr(entry, "module_name", ""), getattr(entry, "class_name", "")
