# SPDX-License-Identifier: Apache-2.0
"""Modules of an adapter that no layer of this rank uses: a fault, or left out by a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def sort_unmatched(
    manager: Any, adapter: Any, unmatched: Mapping[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
    """Separate modules that a layer should use from those that this server leaves out.

    Modules of layers that exist on other ranks only are in neither group.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
        unmatched: module -> its ``LoRALayerWeights``.

    Returns:
        The faults as phrases, and reason -> modules left out by this server's settings.
    """
    faults: list[str] = []
    left_out: dict[str, list[str]] = {}
    layers = dict(manager.model.named_modules(remove_duplicate=False)) if unmatched else {}
    # Layers of other pipeline ranks, and towers that this server runs without.
    absent = [
        path
        for path, layer in layers.items()
        if type(layer).__name__ in ("PPMissingLayer", "StageMissingLayer")
    ]
    targets = getattr(manager.lora_config, "target_modules", None)
    for module, weights in unmatched.items():
        if any(_is_inside(manager, adapter, module, weights, path) for path in absent):
            continue
        names = [module, *_fused_paths(manager.packed_modules_mapping, module)]
        path = next((name for name in names if name in layers), None)
        if path is None:
            faults.append(f"module {module}: this model has no such layer")
        elif targets is not None and not any(
            name in targets or name.rpartition(".")[2] in targets for name in names
        ):
            left_out.setdefault("--lora-target-modules does not name them", []).append(module)
        elif manager.supports_mm and manager._get_punica_wrapper(path) is None:
            left_out.setdefault("this server has no LoRA on that part of the model", []).append(
                module
            )
        else:
            modules = [path.rpartition(".")[2] for path in manager.packed_modules.get(path, ())]
            faults.append(
                f"module {module}: vLLM would ignore it, because its layer {path} "
                f"({type(layers[path]).__name__}) takes {', '.join(modules) or 'no LoRA'}"
            )
    return faults, left_out


def _fused_paths(packed: Mapping[str, Sequence[str]], module: str) -> list[str]:
    """Return the paths that a module's fused layer would have."""
    return [
        module.removesuffix(child) + fused
        for fused, children in packed.items()
        for child in children
        if f".{module}".endswith(f".{child}")
    ]


def _is_inside(manager: Any, adapter: Any, module: str, weights: Any, path: str) -> bool:
    """Return whether vLLM's look-up would find these weights for a module in the layer ``path``."""
    parts = path.split(".")
    candidates = (".".join([*parts[:n], module]) for n in range(len(parts)))
    return any(
        f"{name}.".startswith(f"{path}.")
        and manager._get_lora_layer_weights(adapter, name) is weights
        for name in candidates
    )
