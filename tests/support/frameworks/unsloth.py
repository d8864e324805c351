"""Unsloth: classes and a request of its own take the places of vLLM's, and derive from none of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import deliveries
from support.frameworks.framework import Framework, read


class Unsloth(Framework):
    name = "unsloth"
    source = (
        "unsloth-zoo 2026.10.9, unsloth_zoo/vllm_lora_worker_manager.py, vllm_lora_request.py, "
        "vllm_utils.py (patch_vllm_lora_load_tensors)"
    )

    def patch(self) -> None:
        if self.module is None:
            deliveries.Replacements().build_classes()()
            return
        # What `patch_vllm_lora_load_tensors` assigns. Its module cannot be imported without a GPU.
        from vllm.lora import request, worker_manager
        from vllm.v1.worker import lora_model_runner_mixin as mixin

        own_request = importlib.import_module("unsloth_zoo.vllm_lora_request").LoRARequest
        request.LoRARequest = worker_manager.LoRARequest = own_request
        worker_manager.WorkerLoRAManager = self.module.WorkerLoRAManager
        worker_manager.LRUCacheWorkerLoRAManager = self.module.LRUCacheWorkerLoRAManager
        mixin.LRUCacheWorkerLoRAManager = self.module.LRUCacheWorkerLoRAManager

    def add(self, worker_manager: Any, number: int, folder: Path) -> None:
        tensors, config = read(folder)
        if self.module is not None:
            own_request = importlib.import_module("unsloth_zoo.vllm_lora_request").LoRARequest
            request = own_request(str(number), number, lora_tensors=tensors, lora_config=config)
        else:  # neither a path nor `load_inplace`
            request = SimpleNamespace(
                lora_name=str(number),
                lora_int_id=number,
                adapter_id=number,
                lora_path="",
                tensors=tensors,
                config=config,
            )
        worker_manager.add_adapter(request)
