"""AReaL: an adapter that is loaded is replaced past the worker's LoRA manager, from broadcast tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from support.frameworks.framework import Framework, load_tensors, read


class Areal(Framework):
    name = "areal"
    source = "areal 1.0.4, areal/engine/vllm_ext/vllm_worker_extension.py"

    def begin(self, worker_manager: Any, number: int, folder: Path) -> None:
        # Its first version of an adapter is loaded from a folder.
        super().add(worker_manager, number, folder)

    def add(self, worker_manager: Any, number: int, folder: Path) -> None:
        tensors, config = read(folder)
        if self.module is not None:
            self._update(worker_manager, number, tensors, config)
            return
        adapter = load_tensors(worker_manager, number, tensors, config)
        worker_manager.remove_adapter(number)
        worker_manager._adapter_manager._add_adapter(adapter)
        worker_manager._adapter_manager.activate_adapter(number)

    def _update(
        self,
        worker_manager: Any,
        number: int,
        tensors: dict[str, torch.Tensor],
        config: dict[str, Any],
    ) -> None:
        """Call AReaL's own method; the tensors arrive without a second process.

        Raises:
            RuntimeError: the method reports an error.
        """
        extension = self.module.VLLMWorkerExtension
        runner = SimpleNamespace(
            lora_manager=worker_manager,
            model=worker_manager._adapter_manager.model,
            device=torch.device("cpu"),
            vllm_config=SimpleNamespace(),
        )
        worker = mock.MagicMock(model_runner=runner)
        worker.weight_update_groups = {"group": None}
        worker._lora_partial_shards = {}
        extension.areal_set_weight_meta_lora(
            worker,
            names=list(tensors),
            dtypes=[tensor.dtype for tensor in tensors.values()],
            shapes=[list(tensor.shape) for tensor in tensors.values()],
            group_name="group",
            lora_name=str(number),
            lora_int_id=number,
            lora_target_modules=config["target_modules"],
            lora_rank=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_bias="none",
            base_model_name="",
        )
        sent = iter(tensors.values())

        def receive(tensor: torch.Tensor, **_: Any) -> None:
            tensor.copy_(next(sent))

        with (
            mock.patch.object(torch.distributed, "broadcast", receive),
            mock.patch.object(self.module, "set_current_vllm_config"),
            mock.patch.object(self.module, "logger"),
        ):
            is_done, text = extension.areal_update_weight_lora_xccl(worker)
        if not is_done:
            raise RuntimeError(text)
