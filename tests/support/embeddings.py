"""The base weights of the embedding and lm_head of ``manager.py``'s model."""

from __future__ import annotations

import torch

from support import manager


def load(weight: torch.Tensor) -> None:
    """Load ``weight`` into the embedding and lm_head of this process's TP rank."""
    model = manager.get_rank().manager.model
    for path in ("model.embed_tokens", "lm_head"):
        layer = model.get_submodule(path)
        layer = getattr(layer, "base_layer", layer)
        layer.weight_loader(layer.weight, weight)
