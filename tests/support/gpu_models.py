"""vLLM's model classes with LoRA on the GPU kernels: built on the CPU, then moved to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.lora import worker_manager

from support import gpu, models, verdicts


class KernelRankModel(models.RankModel):
    """A rank's model whose wrapped layers are on the kernels' device; inputs and outputs are on the CPU."""

    def wrap(self) -> None:
        """Move the model to the device and build the LoRA layers there."""
        self.model.to(gpu.device())
        build = worker_manager.LRUCacheWorkerLoRAManager

        def build_there(config: Any, _: torch.device, *rest: Any) -> Any:
            return build(config, torch.device(gpu.device()), *rest)

        with mock.patch.object(worker_manager, "LRUCacheWorkerLoRAManager", build_there):
            super().wrap()
        gpu.forget_addresses()

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Run a layer."""
        return super().forward(name, x.to(gpu.device())).cpu()


@contextmanager
def on_gpu_kernels() -> Iterator[mock.Mock]:
    """Let ``verdicts.measure_outcomes`` use the kernels; yield a mock that counts calls of expand."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    product, expand, calls = verdicts._product, PunicaWrapperGPU.add_expand, mock.Mock()

    def product_there(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return product(x.to(layer.weight.device), layer).cpu()

    def add_expand(self: Any, *args: Any, **kwargs: Any) -> None:
        calls()
        expand(self, *args, **kwargs)

    with (
        gpu.allow_float32(),
        mock.patch.object(verdicts, "RankModel", KernelRankModel),
        mock.patch.object(verdicts, "_product", product_there),
        mock.patch.object(PunicaWrapperGPU, "add_expand", add_expand),
    ):
        yield calls
