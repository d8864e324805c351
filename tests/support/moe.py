"""vLLM's LoRA layers of a mixture of experts, and their manager, without a model or a kernel.

The constructors need a GPU's kernels, so their attributes are set here. Admission, packing and
``set_lora`` are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

EXPERTS, HIDDEN, INTERMEDIATE, RANK, MAX_RANK = 6, 32, 16, 4, 8
PATH = "model.layers.0.mlp.experts"

Tensors = dict[str, torch.Tensor]


class Experts:
    """One mixture's LoRA layer and its ``LoRAModelManager``.

    Args:
        stacked: the layer's class is that for experts stacked in one tensor.
        gated: an expert has gate_proj and up_proj; otherwise it has up_proj only.
        mixed: ``--enable-mixed-moe-lora-format``.
        shared: ``--enable-moe-shared-loras``.
        is_3d_file: the request's ``is_3d_lora_weight``.
        ep_rank: this rank's number under ``--enable-expert-parallel`` on two ranks.
    """

    def __init__(
        self,
        *,
        stacked: bool = False,
        gated: bool = True,
        mixed: bool = False,
        shared: bool = False,
        is_3d_file: bool = False,
        ep_rank: int | None = None,
    ) -> None:
        self.slices = 1 if stacked or not gated else 2
        layer_class = FusedMoE3DWithLoRA if stacked else FusedMoEWithLoRA
        self.layer = _build_layer(layer_class, self.slices, shared, ep_rank)
        kinds = ("gate_proj", "down_proj", "up_proj") if gated else ("up_proj", "down_proj")
        packed = [f"experts.{e}.{kind}" for e in range(EXPERTS) for kind in kinds]
        if shared:
            packed = [f"experts.w{n}" for n in (1, 2, 3)]
        if stacked:
            packed = []
        self.manager = _build_manager(self.layer, packed, stacked, gated, mixed, shared)
        self.is_3d_file = is_3d_file

    def add(self, tensors: Tensors, rank: int = RANK) -> str:
        """Add an adapter by ``_add_adapter`` and fill slot 0; return the error, or an empty string."""
        helper = PEFTHelper.from_dict(
            {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["experts"]}
        )
        adapter = LoRAModel.from_lora_tensors(
            1,
            {f"base_model.model.{PATH}{name}": t.clone() for name, t in tensors.items()},
            helper,
            device="cpu",
            dtype=torch.float32,
        )
        adapter.is_3d_lora_weight = self.is_3d_file
        try:
            self.manager._add_adapter(adapter)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        weights = adapter.loras[PATH]
        self.layer.set_lora(0, weights.lora_a, weights.lora_b)
        return ""

    def deltas(self) -> list[torch.Tensor]:
        """Return what slot 0 adds to gate_up (or up) and to down: ``(experts, rows, columns)`` each."""
        layer = self.layer
        first = [
            layer.w13_lora_b_stacked[n][0] @ layer.w13_lora_a_stacked[n][0]
            for n in range(self.slices)
        ]
        return [torch.cat(first, 1), layer.w2_lora_b_stacked[0][0] @ layer.w2_lora_a_stacked[0][0]]


def _build_layer(layer_class: type[Any], slices: int, shared: bool, ep_rank: int | None) -> Any:
    layer = layer_class.__new__(layer_class)
    nn.Module.__init__(layer)
    rows = 2 * INTERMEDIATE if layer_class is FusedMoE3DWithLoRA else INTERMEDIATE
    local = EXPERTS if ep_rank is None else EXPERTS // 2
    once = 1 if shared else local

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape)

    layer.w13_lora_a_stacked = tuple(zeros(once, MAX_RANK, HIDDEN) for _ in range(slices))
    layer.w13_lora_b_stacked = tuple(zeros(local, rows, MAX_RANK) for _ in range(slices))
    layer.w2_lora_a_stacked = (zeros(local, MAX_RANK, INTERMEDIATE),)
    layer.w2_lora_b_stacked = (zeros(once, HIDDEN, MAX_RANK),)
    layer.adapter_enabled = torch.zeros(2, dtype=torch.int)
    layer.moe_config = SimpleNamespace(
        num_experts=EXPERTS,
        num_local_experts=local,
        moe_parallel_config=SimpleNamespace(ep_rank=ep_rank or 0, use_ep=ep_rank is not None),
    )
    layer.tp_size, layer.tp_rank, layer.fully_sharded, layer._w13_slices = 1, 0, False, slices
    layer._base_model, layer.enable_moe_shared_loras = "Model", shared
    return layer


def _build_manager(
    layer: Any, packed: Sequence[str], stacked: bool, gated: bool, mixed: bool, shared: bool
) -> Any:
    model = nn.Module()
    parent = model
    for name in PATH.split(".")[:-1]:
        setattr(parent, name, nn.Module())
        parent = getattr(parent, name)
    parent.experts = layer
    model.config = SimpleNamespace(architectures=["Model"])
    manager = LoRAModelManager.__new__(LoRAModelManager)
    vars(manager).update(
        model=model,
        modules={PATH: layer},
        lora_config=LoRAConfig(max_lora_rank=MAX_RANK, max_loras=1, lora_dtype=torch.float32),
        packed_modules_mapping={"experts": list(packed)},
        packed_modules={PATH: [PATH.removesuffix("experts") + p for p in packed]} if packed else {},
        is_pooling_model=False,
        supports_mm=False,
        _is_3d_moe_model=stacked,
        _is_non_gated_moe=not gated,
        _enable_mixed_moe_lora_format=mixed,
        _enable_moe_shared_loras=shared,
        _registered_adapters={},
    )
    return manager
