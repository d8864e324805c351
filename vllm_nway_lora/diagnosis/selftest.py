# SPDX-License-Identifier: Apache-2.0
"""Compare tiny fused layers of the installed vLLM with dense arithmetic, in one process."""

from __future__ import annotations

import inspect
import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora import utils, worker_manager  # noqa: F401  (its import applies the patches)
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.utils import torch_utils

from vllm_nway_lora.diagnosis.offline import Rank, initialize
from vllm_nway_lora.diagnosis.stand_ins import StandInGroup
from vllm_nway_lora.layers.punica import group_by_adapter

_INPUT, _TOKENS, _RANK = 16, 4, 8


@dataclass(frozen=True)
class Fusion:
    """A fused projection: its outputs' sizes, its modules and their rows."""

    name: str
    sizes: tuple[int, ...]
    modules: tuple[str, ...]
    rows: tuple[int, ...]


FUSIONS = (
    Fusion("in_proj_qkvz", (16, 16, 32, 32), ("in_proj_qkv", "in_proj_z"), (64, 32)),
    Fusion("in_proj_qkvg", (8, 8, 16, 8), ("q", "k", "v", "g"), (8, 8, 16, 8)),
    Fusion("in_proj", (16, 16, 8, 8, 4), ("in_proj",), (52,)),
    Fusion("interleaved", (48,), ("interleaved",), (48,)),
)


def run() -> dict[str, str]:
    """Return per layer and mode ``exact``, or the fault."""
    initialize()
    found = {}
    with _unpinned():
        for fusion, size, sharded in itertools.product(FUSIONS, (1, 2), (False, True)):
            label = f"{fusion.name}, TP={size}{', fully sharded' * sharded}"
            try:
                found[label] = "exact" if _is_exact(fusion, size, sharded) else "WRONG"
            except Exception as error:
                found[label] = f"{type(error).__name__}: {error}"
    return found


def _unpinned() -> AbstractContextManager[Any]:
    """Keep LoRA's token mapping out of pinned memory, which a machine without a GPU lacks.

    vLLM 0.22.0 to 0.23.0 pins it by default (``async_tensor_h2d`` in vllm/utils/torch_utils.py,
    called in vllm/lora/punica_wrapper/utils.py). Earlier releases do not pin it; 0.24.0 and later
    ask the platform.
    """
    copy = getattr(torch_utils, "async_tensor_h2d", None)
    if copy is None or "pin_memory" not in inspect.signature(copy).parameters:
        return nullcontext()
    return mock.patch.object(copy, "__defaults__", (False,))


def _is_exact(fusion: Fusion, size: int, sharded: bool) -> bool:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        # float32 represents all sums of their products exactly, so results can be compared bit by bit.
        return torch.randint(-3, 4, shape, generator=generator).float()

    x, weight = integers(_TOKENS, _INPUT), integers(sum(fusion.sizes), _INPUT)
    lora_a = [integers(_RANK, _INPUT) for _ in fusion.rows]
    lora_b = [integers(rows, _RANK) for rows in fusion.rows]
    # The first module alone, the last module alone, and all modules.
    for adapted in {(0,), (len(lora_a) - 1,), tuple(range(len(lora_a)))}:
        a = [t if m in adapted else None for m, t in enumerate(lora_a)]
        b = [t if m in adapted else None for m, t in enumerate(lora_b)]
        delta = torch.cat(
            [
                b_ @ a_ * (m in adapted)
                for m, (a_, b_) in enumerate(zip(lora_a, lora_b, strict=True))
            ]
        )
        merged = (weight + delta).split(fusion.sizes)
        ranks = [_Layer(fusion, rank, size, sharded, weight, a, b) for rank in range(size)]
        for rank in ranks:
            rank.forward(x)
        sent = [list(rank.here.group.sent) for rank in ranks]
        for number, rank in enumerate(ranks):
            rank.here.group.replies = [torch.cat(parts, -1) for parts in zip(*sent, strict=True)]
            expected = torch.cat([part.chunk(size)[number] for part in merged])
            if not torch.equal(rank.forward(x), x @ expected.T):
                return False
    return True


class _Layer:
    """One rank's fused layer with one adapter in its slot."""

    def __init__(
        self,
        fusion: Fusion,
        rank: int,
        size: int,
        sharded: bool,
        weight: torch.Tensor,
        lora_a: list[torch.Tensor | None],
        lora_b: list[torch.Tensor | None],
    ) -> None:
        self.here = Rank(StandInGroup(rank, size), VllmConfig())
        config = LoRAConfig(
            max_lora_rank=_RANK,
            max_loras=1,
            fully_sharded_loras=sharded,
            lora_dtype=torch.float32,
        )
        with self.here.current():
            base = MergedColumnParallelLinear(
                _INPUT,
                list(fusion.sizes),
                bias=False,
                params_dtype=torch.float32,
                prefix=f"selftest.{fusion.name}",
            )
            for shard, part in enumerate(weight.split(fusion.sizes)):
                base.weight.weight_loader(base.weight, part, shard)
            base.quant_method.process_weights_after_loading(base)
            self.layer = utils.from_layer(base, 1, config, list(fusion.modules), None)
            single = len(lora_a) == 1
            self.layer.set_lora(0, *((t[0] if single else t) for t in (lora_a, lora_b)))
        punica = group_by_adapter(PunicaWrapperCPU(_TOKENS, _TOKENS, "cpu", lora_config=config))
        mapping = LoRAMapping((1,) * _TOKENS, (1,), is_prefill=True)
        punica.update_metadata(mapping, [1], 2, 64)
        self.layer.set_mapping(punica)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.here.current():
            output = self.layer(x)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result
