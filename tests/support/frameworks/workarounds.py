"""OpenPipe/ART and prime-rl had workarounds for defects that this package fixes; older releases have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.frameworks.framework import Framework

_FOUR = {"in_proj_qkvz": ["in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"]}


def _allow_as_many_modules_as_outputs() -> None:
    """Have vLLM's class for merged layers take one module per output (vllm-project/vllm#36372)."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
    from vllm.lora.layers.utils import _not_fully_sharded_can_replace
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    def can_replace_layer(
        cls: Any,
        source_layer: Any,
        lora_config: Any,
        packed_modules_list: list[str],
        model_config: Any = None,
    ) -> bool:
        is_merged = type(source_layer) is MergedColumnParallelLinear
        return is_merged and len(source_layer.output_sizes) == len(packed_modules_list)

    decorated = _not_fully_sharded_can_replace(can_replace_layer)
    MergedColumnParallelLinearWithLoRA.can_replace_layer = classmethod(decorated)


class Art(Framework):
    name = "art"
    source = (
        "OpenPipe/ART before 0.5.18, and three others: the patch that cites vllm-project/vllm#36372"
    )
    packed = _FOUR

    def patch(self) -> None:
        _allow_as_many_modules_as_outputs()


class PrimeRl(Framework):
    """A call of the worker loads an adapter again; a step does not."""

    name = "prime-rl"
    source = "older prime-rl: _patched_add_adapter(force_load), and ART's patch of in_proj_qkvz"
    packed = _FOUR

    def patch(self) -> None:
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        _allow_as_many_modules_as_outputs()

        def add_adapter(worker_manager: Any, lora_request: Any, force_load: bool = True) -> bool:
            manager, number = worker_manager._adapter_manager, lora_request.lora_int_id
            if force_load or number not in worker_manager.list_adapters():
                adapter = worker_manager._load_adapter(lora_request)
                manager.remove_adapter(adapter.id)
                if len(manager) + 1 > manager.capacity:
                    manager.remove_oldest_adapter()
                manager.add_adapter(adapter)
            manager.activate_adapter(number)
            return True

        def apply_adapters(worker_manager: Any, lora_requests: set[Any]) -> None:
            for lora_request in lora_requests:
                worker_manager.add_adapter(lora_request, force_load=False)

        LRUCacheWorkerLoRAManager.add_adapter = add_adapter
        LRUCacheWorkerLoRAManager._apply_adapters = apply_adapters

    def begin(self, worker_manager: Any, number: int, folder: Path) -> None:
        # The adapter's older version, which the next call replaces.
        self.add(worker_manager, number, folder)
