# SPDX-License-Identifier: Apache-2.0
"""Check adapter_config.json: refuse settings that the installed release ignores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_nway_lora.adapters.errors import AdapterError

#: Keys that change an adapter's output. A release whose `PEFTHelper` lacks such a field ignores it
#: (vLLM until 0.31.0 ignores all of them except `use_dora`). Names and meanings are PEFT's.
_MEANINGFUL_KEYS = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)

#: Values of `bias` other than "none" say that biases were trained. vLLM refuses them, although PEFT
#: saves no bias for layers without one. `tensors.py` and vLLM's name parser refuse the biases.
_BIASES = ("all", "lora_only")

#: Values of `init_lora_weights` whose adapters need the base weights that PEFT has modified.
_MODIFYING_INITS = ("pissa", "olora", "corda", "loftq")


def validate_config(wrapped: Any, peft_helper: Any, args: Any, kwargs: Any) -> Any:
    """Refuse settings that this release would ignore; wraps ``PEFTHelper.from_dict``.

    Raises:
        AdapterError: adapter_config.json has such a setting; the message names it.
    """
    config: Mapping[str, Any] = args[0] if args else kwargs["config_dict"]
    kind = config.get("peft_type")
    if kind is not None and str(getattr(kind, "value", kind)).upper() != "LORA":
        raise AdapterError(
            f"adapter_config.json has peft_type={kind!r}: vLLM would read the adapter as plain LoRA"
        )
    known = {field.name for field in dataclasses.fields(peft_helper)}
    ignored = [key for key in _MEANINGFUL_KEYS if key not in known and config.get(key)]
    init = config.get("init_lora_weights")
    if "init_lora_weights" not in known and str(init).lower().startswith(_MODIFYING_INITS):
        ignored.append("init_lora_weights")
    if ignored:
        entries = ", ".join(f"{key}={config[key]!r}" for key in ignored)
        raise AdapterError(
            f"adapter_config.json has {entries}, which this release does not know and would "
            "ignore. Use a later vLLM, or save the adapter with PEFT without that setting"
        )
    if config.get("bias") in _BIASES:
        config = {**config, "bias": "none"}
    return wrapped(config)
