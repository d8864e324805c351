# SPDX-License-Identifier: Apache-2.0
"""A model's LoRA layers on one tensor-parallel rank, without engine, weights or device.

The model's own class is built on the meta device, and vLLM's own LoRA manager wraps it, with the
plugin or without it. Its layers are therefore those of a worker of this vLLM.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm.platforms
from transformers import PretrainedConfig
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry
from vllm.plugins import load_general_plugins
from vllm.triton_utils import triton

from vllm_nway_lora.diagnosis.mixtures import without_kernels


class StandInGroup:
    """The part of a tensor-parallel group that layers use, for one simulated rank.

    Attributes:
        sent: the tensors that the rank has passed to gathers.
        replies: the results of its next gathers. If empty, a gather returns the rank's own part for
            every rank.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group = self.rank = self.local_rank = rank
        self.world_size = size
        self.ranks = list(range(size))
        self.unique_name = f"stand-in:{rank}"
        self.cpu_group = self.device_group = self.device_communicator = None
        self.sent: list[torch.Tensor] = []
        self.replies: list[torch.Tensor] = []

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return the next reply, or a tensor of its shape."""
        self.sent.append(x.clone())
        return self.replies.pop(0) if self.replies else torch.cat([x] * self.world_size, dim)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``: row-parallel layers are not examined."""
        return x


@dataclass
class Rank:
    """One simulated rank: its group, its configuration and, after :func:`build`, its model."""

    group: StandInGroup
    vllm_config: VllmConfig
    model: Any = None
    worker_manager: Any = field(default=None, repr=False)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this rank the process's current one."""
        real = parallel_state._TP
        parallel_state._TP = self.group
        try:
            with set_current_vllm_config(self.vllm_config):
                yield
        finally:
            parallel_state._TP = real

    def wrap(self) -> None:
        """Wrap the model with vLLM's LoRA manager. LoRA's tensors are on the CPU, those of experts on meta."""
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        cpu = torch.device("cpu")
        device = mock.patch("vllm.lora.layers.base_linear._get_lora_device", return_value=cpu)
        with self.current(), device, without_kernels():
            embeddings = getattr(self.model, "embedding_modules", {})
            self.worker_manager = LRUCacheWorkerLoRAManager(self.vllm_config, cpu, embeddings)
            self.worker_manager.create_lora_manager(self.model, self.vllm_config)

    def warm_up(self) -> None:
        """Activate a dummy adapter, as vLLM does before it captures graphs, and remove it."""
        manager = self.worker_manager
        model = self.lora_manager.model
        # A dummy has the tensors of every expert, which can be gigabytes.
        dense = [
            (name, layer)
            for name, layer in model.named_modules(remove_duplicate=False)
            if not isinstance(layer, FusedMoEWithLoRA)
        ]
        layers = self.lora_manager.modules
        layers = {n: of for n, of in layers.items() if not isinstance(of, FusedMoEWithLoRA)}
        with (
            self.current(),
            mock.patch.object(model, "named_modules", return_value=dense),
            mock.patch.object(self.lora_manager, "modules", layers),
            manager.dummy_lora_cache(),
        ):
            manager.add_dummy_lora(
                LoRARequest("warm-up", 1, "-"), self.vllm_config.lora_config.max_lora_rank
            )
            manager._adapter_manager.activate_adapter(1)
            manager.remove_all_adapters()

    @property
    def lora_manager(self) -> Any:
        """The ``LoRAModelManager`` of the wrapped model."""
        return self.worker_manager._adapter_manager


def configure(
    model: str,
    rank: int,
    size: int,
    *,
    fully_sharded: bool = False,
    max_lora_rank: int = 8,
    max_loras: int = 1,
    model_impl: str = "auto",
) -> Rank:
    """Return a rank without its model.

    Args:
        model: a local folder with ``config.json``.
        rank: of the tensor-parallel group.
        size: of the tensor-parallel group.
        fully_sharded: ``--fully-sharded-loras``.
        max_lora_rank: ``--max-lora-rank``.
        max_loras: ``--max-loras``.
        model_impl: ``--model-impl``.
    """
    initialize()
    for architecture in (
        json.loads(Path(model, "config.json").read_text()).get("architectures") or ()
    ):
        with suppress(Exception):  # vLLM raises it again, with the reason
            import_class(architecture)
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=model,
            tokenizer=model,
            skip_tokenizer_init=True,
            model_impl=model_impl,
            dtype="float32",
            max_model_len=64,
            enforce_eager=True,
            hf_overrides=_drop_quantisation,
        ),
        lora_config=LoRAConfig(
            max_lora_rank=max_lora_rank,
            max_loras=max_loras,
            fully_sharded_loras=fully_sharded,
            lora_dtype=torch.float32,
        ),
        # The command line's default for hybrid models. 0.24.0 raises on the class's own default.
        cache_config=CacheConfig(enable_prefix_caching=False),
    )
    # Set afterwards: the configuration's validation would require that many devices.
    vllm_config.parallel_config.tensor_parallel_size = size
    # vLLM 0.17 validates copies of the configuration and would require 4 GiB per rank.
    vllm_config.cache_config.swap_space = 0
    return Rank(StandInGroup(rank, size), vllm_config)


def _drop_quantisation(config: Any) -> Any:
    """Remove the quantisation from a ``PretrainedConfig`` and its parts.

    A quantised weight has the rows and columns of a plain one, and its kernels need a GPU.
    """
    for part in (config, *vars(config).values()):
        if isinstance(part, PretrainedConfig) and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def import_class(architecture: str) -> Any:
    """Import and return a model's class.

    vLLM inspects a class in a subprocess that imports everything again, unless it is imported here.

    Raises:
        KeyError: vLLM has no such model.
    """
    registered: Any = ModelRegistry.models[architecture]
    model_class = registered.load_model_cls()
    if hasattr(registered, "module_name"):  # registered by name only
        ModelRegistry.register_model(architecture, model_class)
    return model_class


def build(rank: Rank, device: str = "meta") -> None:
    """Build the model's class as vLLM does on this rank."""
    from vllm.model_executor.model_loader.utils import initialize_model

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Some classes name the device themselves and compute on it in their constructor.
        named = mock.patch.object(
            vllm.platforms.current_platform, "current_device", return_value=device, create=True
        )
        # Older builds of Triton, and vLLM's stand-in for it, lack this function (OLMo hybrid).
        allocator = mock.patch.object(triton, "set_allocator", create=True)
        with rank.current(), torch.device(device), named, allocator:
            rank.model = initialize_model(vllm_config=rank.vllm_config)
    finally:
        torch.set_default_dtype(default)


def initialize() -> None:
    """Set up the process: plugins, a platform, and the process groups of one rank."""
    load_general_plugins()
    platforms: Any = vllm.platforms
    if not platforms.current_platform.device_type:
        from vllm.platforms.cpu import CpuPlatform

        # A GPU build without a GPU has no platform at all.
        platforms._current_platform = CpuPlatform()
    if parallel_state.model_parallel_is_initialized():
        return
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        store = f"file://{Path(folder) / 'store'}"
        parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
        parallel_state.initialize_model_parallel(1)
