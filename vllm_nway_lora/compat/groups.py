# SPDX-License-Identifier: Apache-2.0
"""All groups of patches: vLLM's attributes that this package replaces, and those that it needs for it."""

from __future__ import annotations

from vllm_nway_lora import settings
from vllm_nway_lora.compat import defects, engine_groups, worker_groups
from vllm_nway_lora.compat.patching import Group

GROUPS = (*worker_groups.GROUPS, *engine_groups.GROUPS)


def is_needed(group: Group, version: str) -> bool:
    """Return whether ``version`` of vLLM has a defect that ``group`` fixes."""
    return any(defects.find(name).affects(version) for name in group.defects)


def is_switched_on(group: Group) -> bool:
    """Return whether the environment leaves ``group`` on.

    Raises:
        ValueError: the value of its variable is invalid.
    """
    return not group.switch or settings.is_on(group.switch)
