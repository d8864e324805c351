# SPDX-License-Identifier: Apache-2.0
"""Modules of an adapter that no layer of this rank uses: a fault, left out, elsewhere, or no loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm_nway_lora.adapters.names import explain
from vllm_nway_lora.adapters.origin import get_origin
from vllm_nway_lora.adapters.served import read_target

_NO_LORA = "this server has no LoRA on that part of the model"


class Unmatched(NamedTuple):
    """Modules that no layer of this rank uses.

    Attributes:
        faults: phrases about modules that a layer should use.
        left_out: reason -> modules that this server's settings leave out.
        elsewhere: modules of layers that exist on other ranks only.
    """

    faults: list[str]
    left_out: dict[str, list[str]]
    elsewhere: list[str]


def sort_unmatched(manager: Any, adapter: Any, unmatched: Mapping[str, Any]) -> Unmatched:
    """Sort modules that no layer uses. A module that adds nothing to the model is in no group.

    Args:
        manager: the rank's ``LoRAModelManager``.
        adapter: the ``LoRAModel``, loaded and not packed yet.
        unmatched: module -> its ``LoRALayerWeights``.
    """
    found = Unmatched([], {}, [])
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
            found.elsewhere.append(module)
            continue
        if _is_zero(weights) or _uses_other_layer(layers, module):
            continue
        names = [module, *_fused_paths(manager.packed_modules_mapping, module)]
        path = next((name for name in names if name in layers), None)
        if path is None and _is_in_tower_without_lora(manager, module):
            found.left_out.setdefault(_NO_LORA, []).append(module)
        elif path is None:
            advice = explain(get_origin(adapter).names.get(module, module), read_target(manager))
            found.faults.append(
                f"module {module}: this model has no such layer{advice and f' ({advice})'}"
            )
        elif targets is not None and not any(
            name in targets or name.rpartition(".")[2] in targets for name in names
        ):
            reason = "--lora-target-modules does not name them"
            found.left_out.setdefault(reason, []).append(module)
        elif manager.supports_mm and manager._get_punica_wrapper(path) is None:
            found.left_out.setdefault(_NO_LORA, []).append(module)
        else:
            modules = [path.rpartition(".")[2] for path in manager.packed_modules.get(path, ())]
            found.faults.append(
                f"module {module}: vLLM would ignore it, because its layer {path} "
                f"({type(layers[path]).__name__}) takes {', '.join(modules) or 'no LoRA'}"
            )
    return found


def _is_zero(weights: Any) -> bool:
    """Return whether a module's product is zero, as that of a module that was never trained is."""
    return any(half is not None and not half.any() for half in (weights.lora_a, weights.lora_b))


def _is_in_tower_without_lora(manager: Any, module: str) -> bool:
    """Return whether a module belongs to a tower or connector on which this server has no LoRA.

    transformers and vLLM can have other modules in one tower (Kimi-K2.5's MoonViT).
    """
    if not manager.supports_mm:
        return False
    mapping = manager.model.get_mm_mapping()
    towers = [f"{path.rstrip('.')}." for path in (*mapping.tower_model, *mapping.connector)]
    names = (module, module.removeprefix("model."))
    return any(
        name.startswith(tower) and manager._get_punica_wrapper(name) is None
        for name in names
        for tower in towers
    )


def _uses_other_layer(layers: Mapping[str, Any], module: str) -> bool:
    """Return whether a module is the K or V projection of an attention with another layer's K and V.

    vLLM's Gemma 4 has no such projections from 0.30.0 on (vllm-project/vllm#54917), older
    transformers do.
    """
    parent, _, name = module.rpartition(".")
    return (
        name in ("k_proj", "v_proj")
        and parent in layers
        and any(
            getattr(child, "kv_sharing_target_layer_name", None) is not None
            for child in layers[parent].children()
        )
    )


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
