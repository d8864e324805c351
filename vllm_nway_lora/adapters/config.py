# SPDX-License-Identifier: Apache-2.0
"""Read adapter_config.json: in vLLM's terms where that is exact, else refused with the reason."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError

_ATTRIBUTE = "_nway_lora_config"

#: The key that ``PEFTHelper.from_local_dir`` adds to a configuration.
_ADDED = "vllm_max_position_embeddings"

#: The kind of a configuration of MLX-LM, which has no ``peft_type``.
MLX = "MLX"

#: Values of ``peft_type`` whose tensors :mod:`vllm_nway_lora.adapters.variants` folds into plain LoRA.
_FOLDED = ("ADALORA", "LOHA", "LOKR", "VERA")

_MERGE = "Merge it into the model with PEFT's merge_and_unload, and serve that model"

#: Other values of ``peft_type`` (PEFT 0.21.2) -> why their adapters cannot be served.
REFUSED_KINDS = {
    "IA3": f"it multiplies activations by trained vectors, which no LoRA does. {_MERGE}",
    "OFT": f"it multiplies the base weight by a rotation, a change of full rank. {_MERGE}",
    "BOFT": f"it multiplies the base weight by a rotation, a change of full rank. {_MERGE}",
    "HRA": f"it multiplies the base weight by reflections, which depends on that weight. {_MERGE}",
    "XLORA": "it weighs several adapters anew for every token. Serve one of these adapters",
    "TRAINABLE_TOKENS": f"it replaces rows of the embedding, which no LoRA does. {_MERGE}",
}

#: Keys that no release serves -> why. Names and meanings are those of PEFT 0.21.2; ``use_mora`` is
#: that of MoRA's fork.
REFUSED_KEYS = {
    "use_dora": "DoRA scales each row of base weight plus LoRA, a change of full rank that depends on "
    f"the base weight. {_MERGE}",
    "lora_bias": "a bias is added to the output for every input, and the product of LoRA-B and LoRA-A "
    "is not. Train the adapter without lora_bias",
    "alora_invocation_tokens": "aLoRA changes only the tokens after its invocation tokens, and vLLM "
    "would change all. Train the adapter as plain LoRA",
    "layer_replication": "the adapter belongs to a model whose layers are repeated. Serve that model "
    "under its own configuration",
    "arrow_config": "Arrow routes every token among several adapters. Serve one of these adapters",
    "kasa_config": f"KaSA also truncates the base weight's singular values. {_MERGE}",
    "monteclora_config": "MonteCLoRA samples its matrices, and its sampler is no LoRA tensor. Save "
    "the adapter as plain LoRA",
    "use_mora": f"MoRA multiplies by a square matrix of full rank. {_MERGE}",
    "trainable_token_indices": "it replaces rows of the embedding, and their change is known only with "
    f"the base model's rows. {_MERGE}, or train the embedding with LoRA (target_modules)",
}

#: Values of ``bias`` other than "none" say that biases were trained. vLLM refuses them, although PEFT
#: saves no bias for layers without one. `tensors.py` and vLLM's name parser refuse the biases.
_BIASES = ("all", "lora_only", "vera_only")

#: Values of ``init_lora_weights`` whose adapters need the base weights that PEFT has modified.
_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq")

#: Modules that vLLM takes whole, from 0.31.0 on (``_validate_features``, vllm/lora/peft_helper.py).
_TAKEN_WHOLE = ("classifier", "score")


def validate_config(wrapped: Any, peft_helper: Any, args: Any, kwargs: Any) -> Any:
    """Pass a configuration to vLLM in its own terms; wraps ``PEFTHelper.from_dict``.

    The result keeps the configuration for :func:`get_config`.

    Raises:
        AdapterError: a setting has no exact equivalent; the message names it and the reason.
    """
    config: Mapping[str, Any] = args[0] if args else kwargs["config_dict"]
    known = {field.name for field in dataclasses.fields(peft_helper)}
    helper = wrapped(_to_plain(config, known))
    raw = {key: value for key, value in config.items() if key != _ADDED}
    setattr(helper, _ATTRIBUTE, raw)
    return helper


def get_config(helper: Any) -> Mapping[str, Any]:
    """Return adapter_config.json of a ``PEFTHelper``; empty if it was not made by ``from_dict``."""
    config: Mapping[str, Any] = getattr(helper, _ATTRIBUTE, {})
    return config


def get_kind(config: Mapping[str, Any]) -> str:
    """Return PEFT's name of an adapter's kind, in capitals, or :data:`MLX`."""
    kind = config.get("peft_type")
    if kind is None:
        return MLX if config.keys() & {"lora_parameters", "fine_tune_type"} else "LORA"
    return str(getattr(kind, "value", kind)).upper()  # a member of PEFT's enum, in memory


def ignores_patterns(helper: Any) -> bool:
    """Return whether a configuration has patterns that this release's ``PEFTHelper`` lacks.

    They are ``rank_pattern`` and ``alpha_pattern``; vLLM reads them from 0.32.0 on.
    """
    config = get_config(helper)
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    return bool(has_patterns) and not hasattr(helper, "rank_pattern")


def find_rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank and the scaling that PEFT 0.21.2 gives a module of LoRA, LoHa or LoKr.

    Args:
        config: adapter_config.json.
        module: the module's name in the file, without ``base_model.model.``.
    """
    # The patterns are for the parameter's name (as in `get_rank_and_scaling`, vllm/lora/peft_helper.py
    # of 0.33.0): PEFT names the LoRA of gate_up_proj `experts.base_layer`, that of down_proj `experts`.
    if module.endswith(".experts.base_layer"):
        module = module.removesuffix("base_layer") + "gate_up_proj"
    elif module.endswith(".experts"):
        module += ".down_proj"
    key = "alpha" if get_kind(config) in ("LOHA", "LOKR") else "lora_alpha"
    rank = find_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = find_pattern(config.get("alpha_pattern"), module, config[key])
    return rank, find_scaling(alpha, rank, config)


def find_scaling(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """Return PEFT's scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def find_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern for a module (``get_pattern_key``, peft/utils/other.py)."""
    return next(
        (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)),
        default,
    )


def _to_plain(config: Mapping[str, Any], known: set[str]) -> Mapping[str, Any]:
    """Return a configuration of plain LoRA whose ranks and scalings `tensors.py` corrects later.

    Args:
        config: adapter_config.json.
        known: the fields of this release's ``PEFTHelper``.
    """
    kind = get_kind(config)
    if kind == MLX:
        return _read_mlx(config)
    if kind not in ("LORA", *_FOLDED):
        reason = REFUSED_KINDS.get(kind, f"vLLM would read the adapter as plain LoRA. {_MERGE}")
        raise AdapterError(f"adapter_config.json has peft_type={config['peft_type']!r}: {reason}")
    if kind == "VERA" and not config.get("save_projection", True):
        raise AdapterError(
            "adapter_config.json has save_projection=False: VeRA's projections vera_A and vera_B are "
            "not in the file, and random numbers made again from projection_prng_key can differ. Save "
            "the adapter with save_projection=True"
        )
    _refuse_keys(config, known)
    changes: dict[str, Any] = {}
    if kind in _FOLDED:
        changes = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_rslora": False}
        changes |= {"rank_pattern": {}, "alpha_pattern": {}}
        changes["target_modules"] = config.get("target_modules") or []
    changes |= {key: None for key in ("use_bdlora", "use_qalora") if config.get(key)}
    if config.get("bias") in _BIASES:
        changes["bias"] = "none"
    return {**config, **changes} if changes else config


def _refuse_keys(config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse the settings that no release serves, or that this one would ignore."""
    for key, reason in REFUSED_KEYS.items():
        if config.get(key):
            raise AdapterError(f"adapter_config.json has {key}={config[key]!r}: {reason}")
    if config.get("use_bdlora") and config.get("use_qalora"):
        raise AdapterError(
            "adapter_config.json has use_bdlora and use_qalora: PEFT has no layer with both. Remove "
            "the one that was not used in training"
        )
    whole = [name for name in config.get("modules_to_save") or () if name not in _TAKEN_WHOLE]
    if whole:
        raise AdapterError(
            f"adapter_config.json has modules_to_save={whole!r}: a module that is saved whole replaces "
            f"the base model's, and no LoRA does. {_MERGE}"
        )
    init = str(config.get("init_lora_weights")).lower()
    if "init_lora_weights" not in known and init.startswith(_MODIFYING_INITS):
        raise AdapterError(
            f"adapter_config.json has init_lora_weights={config['init_lora_weights']!r}: PEFT has "
            "changed the base weights in training, and vLLM serves the original ones. Save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )


def _read_mlx(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of plain LoRA for one of MLX-LM (0.32.2, mlx_lm/tuner/utils.py)."""
    kind = "dora" if config.get("use_dora") else config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"adapter_config.json of MLX-LM has fine_tune_type={kind!r}, and only 'lora' is low-rank. "
            "Fuse it into the model with mlx_lm.fuse, and serve that model"
        )
    parameters = config.get("lora_parameters") or {}
    if "alpha" in parameters:
        raise AdapterError(
            "adapter_config.json of MLX-LM has lora_parameters.alpha: old versions multiply scale by "
            "alpha / rank, later ones ignore alpha, and the file does not tell which one wrote it. "
            "Replace scale by the factor of training, and remove alpha"
        )
    missing = [key for key in ("rank", "scale") if key not in parameters]
    if missing:
        raise AdapterError(
            f"adapter_config.json of MLX-LM lacks lora_parameters.{missing[0]}, which gives LoRA's "
            f"{missing[0]}. Add it as it was in training"
        )
    rank = parameters["rank"]
    return {
        **{key: value for key, value in config.items() if key == _ADDED},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": parameters["scale"] * rank,
        "target_modules": parameters.get("keys") or [],
    }
