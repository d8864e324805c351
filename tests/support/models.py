"""Real vLLM model classes on CPU, as one rank of any tensor-parallel size, all in one process.

Each rank has a stand-in for vLLM's tensor-parallel group, so layers build and load the part of that
rank. The gathers of ``fully_sharded_loras`` return the concatenated parts of all simulated ranks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.mixtures import without_kernels
from vllm_nway_lora.diagnosis.options import ServerOptions

MAX_LORAS = 4
MAX_RANK = 8


# vLLM supports LoRA on Inkling only with this setting.
os.environ["INKLING_MULTIMEM_AR"] = "0"


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model's ``config.json`` with a ``dtype``.

    Without a ``dtype``, vLLM repeatedly looks for weights to find it, on the hub too.
    """
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **config}))


class RankModel:
    """One rank's instance of a model class; :meth:`wrap` adds an empty LoRA manager."""

    def __init__(
        self, config: Mapping[str, Any], rank: int, size: int, fully_sharded: bool = False
    ) -> None:
        import_classes(config)
        self._folder = tempfile.TemporaryDirectory()  # vLLM reads it again for the twin
        save_config(Path(self._folder.name), config)
        self._rank = offline.configure(
            self._folder.name,
            rank,
            ServerOptions(
                tensor_parallel_size=size,
                fully_sharded_loras=fully_sharded,
                max_lora_rank=MAX_RANK,
            ),
            max_loras=MAX_LORAS,
            dtype="float32",
        )
        offline.build(self._rank, "cpu")
        self.group, self.model = self._rank.group, self._rank.model
        self.vllm_config = self._rank.vllm_config
        self.model.float()  # some layers set their own dtype
        for parameter in self.model.parameters():
            parameter.data.zero_()  # so rows that no checkpoint fills are equal in every instance

    def run_as_rank(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` while this process is this rank; return its result."""
        with self._rank.current():
            return function()

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load part of a checkpoint with the model's own code.

        Args:
            weights: name in the checkpoint -> tensor.
        """
        self.run_as_rank(lambda: self.model.load_weights(iter(weights.items())))

    def wrap(self) -> None:
        """Process the weights and build the LoRA layers, as a worker does after loading."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        def wrap() -> None:
            cpu = torch.device("cpu")
            with _pack_linear_weights_only():
                process_weights_after_loading(self.model, self.vllm_config.model_config, cpu)
            runner = LoRAModelRunnerMixin()
            with without_kernels("cpu"):
                runner.load_lora_model(self.model, self.vllm_config, cpu)
            self.worker_manager = runner.lora_manager

        self.run_as_rank(wrap)

    def warm_up(self) -> None:
        """Activate a dummy adapter in every slot, as a worker does before it captures graphs."""
        from vllm.lora.request import LoRARequest

        def warm_up() -> None:
            manager = self.worker_manager
            with manager.dummy_lora_cache():
                requests = [LoRARequest(f"warm-up {n}", n, "-") for n in range(1, MAX_LORAS + 1)]
                for request in requests:
                    manager.add_dummy_lora(request, rank=MAX_RANK)
                for request in requests:
                    manager._adapter_manager.activate_adapter(request.lora_int_id)
            manager.remove_all_adapters()

        self.run_as_rank(warm_up)

    def add_adapter(self, name: str, adapter_id: int, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, adapter_id, str(folder))
        self.run_as_rank(lambda: self.worker_manager.add_adapter(request))

    def remove_adapter(self, adapter_id: int) -> None:
        self.worker_manager.remove_adapter(adapter_id)

    def select_adapter(self, adapter_id: int, tokens: int) -> None:
        """Map all of the next ``tokens`` tokens to an adapter."""
        from vllm.lora.layers import LoRAMapping

        mapping = LoRAMapping((adapter_id,) * tokens, (adapter_id,), is_prefill=True)
        self.worker_manager._adapter_manager.set_adapter_mapping(mapping)

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        output = self.run_as_rank(lambda: self.model.get_submodule(name)(x))
        # Layers return (output, bias), with bias None here. Step5's indexer returns two parts.
        return (
            torch.cat([part for part in output if part is not None], -1)
            if isinstance(output, tuple)
            else output
        )


def forward_all(ranks: list[RankModel], name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """Run a layer on every rank; its gathers return what all ranks have sent."""
    for rank in ranks:
        rank.group.sent.clear()
        rank.forward(name, x)
    sent = [list(rank.group.sent) for rank in ranks]
    for rank in ranks:
        rank.group.replies = [torch.cat(pieces, -1) for pieces in zip(*sent, strict=True)]
    return [rank.forward(name, x) for rank in ranks]


def import_classes(config: Mapping[str, Any]) -> None:
    """Import a model's classes in this process.

    Otherwise vLLM inspects each class in a new process, which imports vLLM again.
    """
    for part in (config, config.get("text_config", {})):
        for architecture in part.get("architectures", ()):
            module = sys.modules[offline.import_class(architecture).__module__]
            # transformers renamed these layer types; vLLM knows only the old names up to 0.24.0.
            layer_types = getattr(module, "ALL_DECODER_LAYER_TYPES", {})
            if "mamba" in layer_types:
                layer_types.setdefault("linear_attention", layer_types["mamba"])
                layer_types.setdefault("full_attention", layer_types["attention"])


def _pack_linear_weights_only() -> AbstractContextManager[Any]:
    """Return a patch that packs CPU weights of linear layers only.

    Up to vLLM 0.20.2, packing a convolution's weight fails.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_linear(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dim() == 2:
            pack(layer, remove_weight)

    return mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", pack_linear)
