"""What every stand-in has: a patch of vLLM, and a way in which it adds an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from support import deliveries
from support.frameworks import packages


class Framework:
    """A framework or platform that uses vLLM's LoRA manager, in a process of its own.

    Attributes:
        name: its name.
        source: where its shape was read: project, release, file.
        packed: what it adds to the model's ``packed_modules_mapping``.
        max_loras: the slots of the LoRA manager.
        takes_layers: whether it takes LoRA layers of other classes than vLLM's.
        unserved: the ends of modules on which its own layers fail, with or without the plugin.
        module: the module of its own package, if that is given (:mod:`support.frameworks.packages`).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    packed: ClassVar[dict[str, list[str]]] = {}
    max_loras: ClassVar[int] = 4
    takes_layers: ClassVar[bool] = True
    unserved: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.module: Any = packages.load(self.name)

    def patch(self) -> None:
        """Change vLLM, as the framework does when it is imported."""

    def begin(self, worker_manager: Any, number: int, folder: Path) -> None:
        """Do what the framework does before it first adds an adapter of that number."""

    def add(self, worker_manager: Any, number: int, folder: Path) -> None:
        """Add an adapter, as the framework does."""
        from vllm.lora.request import LoRARequest

        worker_manager.add_adapter(LoRARequest(str(number), number, str(folder)))


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an adapter's tensors and its configuration."""
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def load_tensors(
    worker_manager: Any, number: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> Any:
    """Load an adapter from memory with vLLM's ``LoRAModel``."""
    request = SimpleNamespace(lora_int_id=number, tensors=tensors, config=config)
    return deliveries.load_from_memory(worker_manager, request)


def load_folder(worker_manager: Any, request: Any) -> Any:
    """Load an adapter from its folder with the method of vLLM's base class."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    return WorkerLoRAManager._load_adapter(worker_manager, request)
