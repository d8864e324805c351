# SPDX-License-Identifier: Apache-2.0
"""The origin of a loaded adapter: what its files say that vLLM's ``LoRAModel`` does not keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ATTRIBUTE = "_nway_lora_origin"


@dataclass(frozen=True)
class Origin:
    """What an adapter's files say.

    Attributes:
        config: adapter_config.json as it was read; empty for an adapter without one.
        names: module's path in vLLM's model -> its name in the files, without ``base_model.model.``.
        rules: the translations that were applied, as phrases for messages, in order.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()


def get_origin(adapter: Any) -> Origin:
    """Return the origin of a ``LoRAModel``; an empty one if it came by another way."""
    origin: Origin = getattr(adapter, _ATTRIBUTE, Origin())
    return origin


def set_origin(adapter: Any, origin: Origin) -> None:
    """Set the origin of a ``LoRAModel``."""
    setattr(adapter, _ATTRIBUTE, origin)
