"""A backend of vLLM's weight transfer that reads a checkpoint, in place of what a trainer sends.

A worker imports this module as the module of its ``worker_extension_cls``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from support.oracle_cases import read_checkpoint

BACKEND = "checkpoint"
#: The options of an engine whose weights this backend updates.
OPTIONS: dict[str, Any] = {
    "weight_transfer_config": {"backend": BACKEND},
    "worker_extension_cls": f"{__name__}.Extension",
}


class CheckpointEngine(WeightTransferEngine[Any, Any]):
    """Loads weights as vLLM's own backends do: in the checkpoint's format, one at a time."""

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's function also waits for an accelerator.
        self.receive_weights(update_info)

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        for weight in read_checkpoint(Path(update_info["folder"])):
            self.model.load_weights([weight])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Extension:
    """Adds nothing to the worker."""


WeightTransferEngineFactory.register_engine(BACKEND, CheckpointEngine)
