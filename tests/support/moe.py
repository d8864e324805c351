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
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

EXPERTS, HIDDEN, INTERMEDIATE, RANK, MAX_RANK = 6, 32, 16, 4, 8
PATH = "model.layers.0.mlp.experts"

A, B = "lora_A.weight", "lora_B.weight"
DOWN, GATE_UP = ".", ".base_layer."

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
        tp: this rank's number and the number of tensor-parallel ranks.
        sharded: ``--fully-sharded-loras``.
        sizes: the hidden and the intermediate size.
        padded: the same, as a kernel pads them, the second one per rank; default: no padding.
        architecture: the model's.
        config: changes to ``adapter_config.json``.
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
        tp: tuple[int, int] = (0, 1),
        sharded: bool = False,
        sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE),
        padded: tuple[int, int] | None = None,
        architecture: str = "Model",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.slices = 1 if stacked or not gated else 2
        layer_class = FusedMoE3DWithLoRA if stacked else FusedMoEWithLoRA
        own = (sizes[0], sizes[1] // tp[1])
        self.layer = _build_layer(layer_class, self.slices, shared, ep_rank, own, padded or own)
        self.layer.tp_rank, self.layer.tp_size = tp
        self.layer.fully_sharded, self.layer._base_model = sharded, architecture
        self.config = config or {}
        kinds = ("gate_proj", "down_proj", "up_proj") if gated else ("up_proj", "down_proj")
        packed = [f"experts.{e}.{kind}" for e in range(EXPERTS) for kind in kinds]
        if shared:
            packed = [f"experts.w{n}" for n in (1, 2, 3)]
        if stacked:
            packed = []
        self.manager = _build_manager(self.layer, packed, stacked, gated, mixed, shared)
        self.manager.model.config = SimpleNamespace(
            architectures=[architecture], hidden_size=sizes[0]
        )
        self.is_3d_file = is_3d_file

    def add(self, tensors: Tensors, rank: int = RANK) -> str:
        """Add an adapter by ``_add_adapter`` and fill slot 0; return the error, or an empty string."""
        helper = PEFTHelper.from_dict(
            {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["experts"]} | self.config
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


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def flat(
    experts: int = EXPERTS,
    rank: int = RANK,
    sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE),
    swapped: bool = False,
) -> Tensors:
    """Return the tensors of PEFT's ``target_parameters``; columns and rows swapped as to PEFT 0.18."""
    hidden, intermediate = sizes
    shapes = {GATE_UP: (hidden, 2 * intermediate), DOWN: (intermediate, hidden)}
    tensors = {}
    for part, shape in shapes.items():
        columns, rows = shape[::-1] if swapped else shape
        tensors[f"{part}{A}"] = integers(experts * rank, columns)
        tensors[f"{part}{B}"] = integers(rows, rank * experts)
    return tensors


def deep(experts: int = EXPERTS, rank: int = RANK, **options: Any) -> Tensors:
    """Return the same tensors as Megatron-Bridge writes them, with three dimensions."""
    return {
        name: t.reshape(experts, rank, -1) if name.endswith(A) else t.reshape(-1, rank, experts)
        for name, t in flat(experts, rank, **options).items()
    }


def per_expert(
    gated: bool = True, rank: int = RANK, sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE)
) -> Tensors:
    kinds = {"up_proj": sizes, "down_proj": sizes[::-1]} | ({"gate_proj": sizes} if gated else {})
    return {
        f".{expert}.{kind}.{half}": integers(*shape) + expert + len(kind)
        for expert in range(EXPERTS)
        for kind, (columns, rows) in kinds.items()
        for half, shape in ((A, (rank, columns)), (B, (rows, rank)))
    }


def shared(sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE)) -> Tensors:
    """Return tensors with the outer matrices shared by all experts."""
    columns = {1: sizes[0], 2: sizes[1], 3: sizes[0]}
    rows = {1: sizes[1], 2: sizes[0], 3: sizes[1]}
    return {f".w{n}.{A}": integers(1 if n != 2 else EXPERTS, RANK, columns[n]) for n in columns} | {
        f".w{n}.{B}": integers(1 if n == 2 else EXPERTS, rows[n], RANK) for n in rows
    }


def expect_flat(tensors: Tensors, rank: int = RANK, scale: float = 2) -> list[torch.Tensor]:
    """Return each expert's delta: A's rows are ordered by expert, B's columns by rank (PEFT)."""
    return [
        scale
        * torch.einsum(
            "ore,eri->eoi",
            tensors[f"{part}{B}"].reshape(-1, rank, EXPERTS),
            tensors[f"{part}{A}"].reshape(EXPERTS, rank, -1),
        )
        for part in (GATE_UP, DOWN)
    ]


def expect_per_expert(
    tensors: Tensors, first: tuple[str, ...] = ("gate_proj", "up_proj"), scale: float = 2
) -> list[torch.Tensor]:
    """Return each expert's delta of ``first``, one below the other, and of down_proj."""

    def stack(kind: str) -> torch.Tensor:
        pairs = [(tensors[f".{e}.{kind}.{B}"], tensors[f".{e}.{kind}.{A}"]) for e in range(EXPERTS)]
        return torch.stack([scale * b @ a for b, a in pairs])

    return [torch.cat([stack(kind) for kind in first], 1), stack("down_proj")]


def expect_shared(tensors: Tensors) -> list[torch.Tensor]:
    """Return each expert's delta of w1 and w3, one below the other, and of w2."""
    return [
        2 * torch.cat([tensors[f".w{n}.{B}"] @ tensors[f".w{n}.{A}"] for n in (1, 3)], 1),
        2 * tensors[f".w2.{B}"] @ tensors[f".w2.{A}"],
    ]


def assert_exact(experts: Experts, tensors: Tensors, expected: list[torch.Tensor]) -> None:
    """Check that an adapter is admitted, and that slot 0 has its experts' deltas."""
    assert experts.add(tensors) == ""
    for found, wanted in zip(experts.deltas(), expected, strict=True):
        assert torch.equal(found, wanted)


def _build_layer(
    layer_class: type[Any],
    slices: int,
    shared: bool,
    ep_rank: int | None,
    own: tuple[int, int],
    padded: tuple[int, int],
) -> Any:
    """Build the layer of a rank with the hidden and intermediate sizes ``own``, padded by a kernel."""
    layer = layer_class.__new__(layer_class)
    nn.Module.__init__(layer)
    hidden, intermediate = padded
    rows = 2 * intermediate if layer_class is FusedMoE3DWithLoRA else intermediate
    local = EXPERTS if ep_rank is None else EXPERTS // 2
    once = 1 if shared else local

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape)

    layer.w13_lora_a_stacked = tuple(zeros(once, MAX_RANK, hidden) for _ in range(slices))
    layer.w13_lora_b_stacked = tuple(zeros(local, rows, MAX_RANK) for _ in range(slices))
    layer.w2_lora_a_stacked = (zeros(local, MAX_RANK, intermediate),)
    layer.w2_lora_b_stacked = (zeros(once, hidden, MAX_RANK),)
    layer.adapter_enabled = torch.zeros(2, dtype=torch.int)
    config = {
        "num_experts": EXPERTS,
        "num_local_experts": local,
        "hidden_dim": hidden,
        "intermediate_size_per_partition": intermediate,
        "moe_parallel_config": SimpleNamespace(ep_rank=ep_rank or 0, use_ep=ep_rank is not None),
    }
    if "hidden_dim_unpadded" in FusedMoEConfig.__dataclass_fields__:
        config |= {
            "hidden_dim_unpadded": own[0],
            "intermediate_size_per_partition_unpadded": own[1],
        }
    else:  # in 0.17.1 a kernel pads the attribute of the base layer only
        config["intermediate_size_per_partition"] = own[1]
    layer.moe_config = SimpleNamespace(**config)
    layer.base_layer = nn.Module()
    layer.base_layer.moe_config = layer.moe_config
    layer.base_layer.hidden_size = hidden
    layer.base_layer.intermediate_size_per_partition = intermediate
    layer._w13_slices, layer.enable_moe_shared_loras = slices, shared
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
