# SPDX-License-Identifier: Apache-2.0
"""A model's LoRA layers on one tensor-parallel rank, without engine, weights or device.

The model's own class is built on the meta device, and vLLM's own LoRA manager wraps it, with the
plugin or without it. Its layers are therefore those of a worker of this vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm
import vllm.platforms
from pydantic import ValidationError
from transformers import PretrainedConfig
from vllm.config import (
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora import model_manager
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry
from vllm.plugins import load_general_plugins

from vllm_nway_lora.diagnosis.mixtures import without_kernels
from vllm_nway_lora.diagnosis.options import ServerOptions, UsageError
from vllm_nway_lora.diagnosis.stand_ins import StandInBudget, StandInGroup
from vllm_nway_lora.diagnosis.without_gpu import without_gpu


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
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        cpu = torch.device("cpu")
        device = mock.patch("vllm.lora.layers.base_linear._get_lora_device", return_value=cpu)
        budget = mock.patch.object(model_manager, "MultiModalBudget", StandInBudget)
        with self.current(), device, budget, without_kernels(), without_gpu("meta"):
            runner = LoRAModelRunnerMixin()
            runner.load_lora_model(self.model, self.vllm_config, cpu)
            self.worker_manager = runner.lora_manager

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
    options: ServerOptions,
    *,
    max_loras: int = 1,
    dtype: str = "bfloat16",
) -> Rank:
    """Return a rank without its model.

    Args:
        model: a local folder with ``config.json``.
        rank: of the tensor-parallel group.
        options: the server's options.
        max_loras: ``--max-loras``.
        dtype: ``--dtype``; LoRA's own is float32.

    Raises:
        UsageError: vLLM does not accept the model's configuration or an option.
        Exception: vLLM does not start with LoRA on this model.
    """
    initialize()
    config = json.loads(Path(model, "config.json").read_text())
    for architecture in config.get("architectures") or ():
        with suppress(Exception):  # vLLM raises it again, with the reason
            import_class(architecture)
    try:
        lora_config = _configure_lora(options, max_loras)
        model_config = ModelConfig(
            model=model,
            tokenizer=model,
            skip_tokenizer_init=True,
            model_impl=options.model_impl,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            max_model_len=64,
            enforce_eager=True,
            hf_overrides=functools.partial(_override, options.hf_overrides or {}),
        )
        size = ParallelConfig()
        # Set afterwards: the configuration's validation would require that many devices.
        size.tensor_parallel_size = options.tensor_parallel_size
        model_config.verify_with_parallel_config(size)
    except Exception as error:
        if find_platform_class(model):
            raise
        raise UsageError(f"vLLM {vllm.__version__}: {format_error(error)}") from error
    # The CPU platform has the older model runner only, which refuses some models.
    with mock.patch.object(VllmConfig, "_validate_v1_model_runner", create=True):
        vllm_config = VllmConfig(
            model_config=model_config,
            lora_config=lora_config,
            # The command line's default for hybrid models. 0.24.0 raises on the class's own default.
            cache_config=CacheConfig(enable_prefix_caching=False),
        )
    vllm_config.parallel_config.tensor_parallel_size = options.tensor_parallel_size
    # vLLM 0.17 validates copies of the configuration and would require 4 GiB per rank.
    vllm_config.cache_config.swap_space = 0
    return Rank(StandInGroup(rank, options.tensor_parallel_size), vllm_config)


def _configure_lora(options: ServerOptions, max_loras: int) -> LoRAConfig:
    given = {
        "target_modules": list(options.lora_target_modules or ()),
        "enable_tower_connector_lora": options.enable_tower_connector_lora,
        "enable_mixed_moe_lora_format": options.enable_mixed_moe_lora_format,
    }
    given = {name: value for name, value in given.items() if value}
    for name in given.keys() - {of.name for of in dataclasses.fields(LoRAConfig)}:
        option = "lora_target_modules" if name == "target_modules" else name
        raise ValueError(f"this release has no --{option.replace('_', '-')}")
    return LoRAConfig(
        max_lora_rank=options.max_lora_rank or 8,
        max_loras=max_loras,
        fully_sharded_loras=options.fully_sharded_loras,
        lora_dtype=torch.float32,
        **given,
    )


def _override(settings: Mapping[str, Any], config: Any) -> Any:
    """Apply the settings of ``--hf-overrides`` to a configuration, and remove its quantisation.

    A quantised weight has the rows and columns of a plain one, and its kernels need a GPU.
    """
    for name, value in settings.items():
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, Mapping):
            _override(value, part)
        else:
            setattr(config, name, value)
    for part in (config, *vars(config).values()):
        if isinstance(part, PretrainedConfig) and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def format_error(error: Exception) -> str:
    """Return an error's class and text on one line; of pydantic's errors, the texts of the faults."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    texts = [
        ": ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")])
        for fault in error.errors()
    ]
    return " ".join("; ".join(texts).split())


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


def find_platform_class(model: str) -> str:
    """Return the module of a model's class if it is for this machine's platform alone; else empty."""
    config = json.loads(Path(model, "config.json").read_text())
    platform = vllm.platforms.current_platform.device_type
    for architecture in config.get("architectures") or ():
        with suppress(Exception):
            module = import_class(architecture).__module__
            if {platform, "vl_stub"} & set(module.split(".")):
                return f"{module}.{architecture}"
    return ""


def build(rank: Rank, device: str = "meta") -> None:
    """Build the model's class as vLLM does on this rank."""
    from vllm.model_executor.model_loader.utils import initialize_model

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with rank.current(), torch.device(device), without_gpu(device):
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
