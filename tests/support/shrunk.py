"""Configurations with few layers for the architectures of vLLM's registry."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from support.families import FAMILIES, Family
from support.families.family import COMMON
from support.families.wrapped import PublishedConfig

Config = dict[str, Any]

_LAYERS = 4
_MOST_LAYERS = 12
#: The fields with a number of layers of a text model. Vision towers stay as they are.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "llm_cfg")

#: Architecture -> the model type of its configuration, where no list of transformers has it.
_MODEL_TYPES: Mapping[str, str] = {
    "ColQwen3": "colqwen3",
    "DeepseekForCausalLM": "deepseek_v2",
    "DeepseekV3BidirectionalModel": "deepseek_v3",
    "EagleMistralLarge3ForCausalLM": "deepseek_v3",
    "GLM4VForCausalLM": "chatglm",
    "InternS1ForConditionalGeneration": "internvl",
    "InternS2PreviewForConditionalGeneration": "qwen3_5_moe",
    "LightOnOCRForConditionalGeneration": "lighton_ocr",
    "MistralLarge3ForCausalLM": "deepseek_v3",
    "NemotronHPuzzleForCausalLM": "nemotron_h",
    "OpenCUAForConditionalGeneration": "qwen2_5_vl",
    "PanguProMoEV2ForCausalLM": "qwen3_moe",
    "PanguUltraMoEForCausalLM": "deepseek_v3",
    "Qwen2_5OmniModel": "qwen2_5_omni",
    "SarvamMLAForCausalLM": "deepseek_v3",
    "TransformersEmbeddingModel": "llama",
    "TransformersForSequenceClassification": "llama",
    "TransformersMoEEmbeddingModel": "mixtral",
    "TransformersMoEForCausalLM": "mixtral",
    "TransformersMoEForSequenceClassification": "mixtral",
    "TransformersMultiModalEmbeddingModel": "qwen2_vl",
    "TransformersMultiModalForCausalLM": "qwen2_vl",
    "TransformersMultiModalForSequenceClassification": "qwen2_vl",
    "TransformersMultiModalMoEForCausalLM": "qwen3_vl_moe",
    "VoxtralRealtimeGeneration": "voxtral_realtime",
}

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}

#: Architecture -> fields that its class needs and its configuration does not have.
_FIELDS: Mapping[str, Config] = {
    "DeepseekForCausalLM": {"moe_intermediate_size": 1408},
    "DeepseekV2ForCausalLM": {"moe_intermediate_size": 1408},
    "Gemma4ForConditionalGeneration": {"vision_config": {"model_type": "gemma4_vision"}},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1},
    "HunYuanMoEV1ForCausalLM": {"moe_topk": 2, "num_experts": 4, "head_dim": 128},
    "LlamaBidirectionalForSequenceClassification": {"pooling": "avg"},
    "LlamaBidirectionalModel": {"pooling": "avg"},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "Plamo3ForCausalLM": _SLIDING,
    "Rnj1ForCausalLM": _SLIDING,
    "SarvamMLAForCausalLM": {"num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 2},
}


def configurations(architecture: str) -> Iterator[tuple[Config, Family | None, bool]]:
    """Yield configurations of an architecture, the family whose stubs each needs, and whether it is
    one of the defaults, of which the first that can be built is enough.

    The defaults are those of transformers' and vLLM's own configuration classes, with few layers and
    as they are. An architecture without a family also gets plain fields, as of Llama. Then follow the families'.
    """
    families = [f for f in FAMILIES if architecture in f.config.get("architectures", ())]
    fields = {"architectures": [architecture]} | _FIELDS.get(architecture, {})
    wholes = []
    for model_type in model_types(architecture):
        if (defaults := _defaults(model_type)) is not None:
            wholes.append({**defaults, "model_type": model_type})
    if not families:
        plain = {**COMMON, "num_hidden_layers": _LAYERS, "hidden_act": "silu"}
        wholes += [{**plain, "model_type": name} for name in ("llama", PublishedConfig.model_type)]
    for whole in wholes:
        for stubs in (None, *families[:1]):
            for config in (shrink(whole), whole):
                yield config | fields, stubs, True
    for family in families:
        yield dict(family.config), family, False


def model_types(architecture: str) -> list[str]:
    """Return the model types that an architecture may have, the likeliest first."""
    if architecture in _MODEL_TYPES:
        return [_MODEL_TYPES[architecture]]
    if listed := _listed().get(architecture):
        return listed
    plain = _plain(architecture)
    similar = [model_type for model_type in _classes() if _plain(model_type) == plain]
    stem = re.sub(r"(For\w+|Model|ChatModel)$", "", architecture)
    return similar or [
        model_type for model_type in _classes() if _plain(model_type) == _plain(stem)
    ]


@functools.cache
def _listed() -> dict[str, list[str]]:
    """Return architecture -> model types, of transformers' lists for its auto classes."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in mapping.items():
                for each in [classes] if isinstance(classes, str) else classes:
                    types = found.setdefault(each, [])
                    types += [] if model_type in types else [model_type]
    return found


@functools.cache
def _classes() -> dict[str, Any]:
    """Return model type -> the mapping that has its configuration class; vLLM's own come first."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    return dict.fromkeys(CONFIG_MAPPING.keys(), CONFIG_MAPPING) | dict.fromkeys(
        _CONFIG_REGISTRY, _CONFIG_REGISTRY
    )


def _defaults(model_type: str) -> Config | None:
    """Return the fields of a model type's default configuration; None if it has none."""
    try:
        config = _classes()[model_type][model_type]()
        return dict(json.loads(json.dumps(config.to_dict(), default=str)))
    except Exception:  # a class without defaults, or of a package that is not installed
        return None


def shrink(config: Mapping[str, Any]) -> Config:
    """Return a configuration with few layers, and at least one of each kind that it names.

    Only the number of layers changes: on the meta device, width takes no memory.
    """
    shrunk = dict(config)
    for name in _TEXT_CONFIGS:
        if isinstance(config.get(name), Mapping):
            shrunk[name] = shrink(config[name])
    counts = [name for name in _COUNTS if isinstance(config.get(name), int)]
    if not counts:
        return shrunk
    old = config[counts[0]]
    new = min(old, _needed(config, old))
    for name in counts:
        shrunk[name] = new if config[name] == old else min(config[name], new)
    for name, value in config.items():
        if isinstance(value, (list, str)) and len(value) == old and name != "architectures":
            shrunk[name] = value[:new]
    if isinstance(config.get("per_layer_config"), Mapping):
        kept = config["per_layer_config"].items()
        shrunk["per_layer_config"] = {key: value for key, value in kept if int(key) < new}
    if (config.get("first_k_dense_replace") or 0) >= new:
        shrunk["first_k_dense_replace"] = 1
    return shrunk


def _needed(config: Mapping[str, Any], layers: int) -> int:
    """Return the number of the first layers among which is one of each kind."""
    needed = _LAYERS
    for name, value in config.items():
        if isinstance(value, (list, str)) and len(value) == layers and value:
            kinds = [str(kind) for kind in value]
            if len(set(kinds)) <= _LAYERS:
                needed = max(needed, *(kinds.index(kind) + 1 for kind in set(kinds)))
        elif re.search(r"(period|interval|pattern|every_n_layers|offset)$", name):
            if isinstance(value, int) and not isinstance(value, bool):
                needed = max(needed, value + ("offset" in name))
    return min(needed, _MOST_LAYERS)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
