# SPDX-License-Identifier: Apache-2.0
"""The names under which a checkpoint stores the modules of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def rename_mapper(model: nn.Module) -> Any:
    """Return the ``WeightsMapper`` with which vLLM maps adapters' names; None if the model has none."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    # `get_unstacked_mapper` in 0.25.0 to 0.28.0, `get_rename_mapper` from 0.29.0 on, the mapper itself
    # before.
    for reduce in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, reduce):
            return getattr(mapper, reduce)()
    return mapper


def checkpoint_names(model: nn.Module, path: str) -> list[str]:
    """Return the names that a checkpoint, and so an adapter, may have for a module of ``model``.

    Every name is one that vLLM maps to ``path`` when it reads an adapter, the likeliest first.

    Args:
        model: the built model.
        path: the module's path in the model.
    """
    mapper = rename_mapper(model)
    if mapper is None:
        return [path]
    path += ".weight"
    names = [path]
    for old, new in mapper.orig_to_new_prefix.items():
        names += [old + name.removeprefix(new) for name in names if new and name.startswith(new)]
        if new == "":
            names += [old + name for name in names]
    for old, new in mapper.orig_to_new_substr.items():
        names += [name.replace(new, old, 1) for name in names if new and new in name]
    unique = list(dict.fromkeys(reversed(names)))
    return [name.removesuffix(".weight") for name in unique if mapper._map_name(name) == path]
