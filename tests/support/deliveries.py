"""The ways in which frameworks bring adapters into vLLM's LoRA manager. Each is a shape in own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Ways that load with the worker's LoRA manager. verl, ms-swift and ROLL replace ``_load_adapter`` on the
#: class that vLLM instantiates, before the plugin is registered or after the engine has started.
BY_WORKER = ("files", "method before", "method after", "classes before")
#: Ways that call a method of the ``LoRAModelManager``, as AReaL does.
BY_MANAGER = ("add_adapter", "_add_adapter")
#: All ways. In the one that is in neither of the others, unsloth-zoo replaces the classes after the
#: plugin is registered.
ALL = (*BY_WORKER, "classes after", *BY_MANAGER)


class Replacements:
    """Restores what the frameworks' shapes replace in ``vllm.lora.worker_manager``."""

    def __init__(self) -> None:
        from vllm.lora import worker_manager

        self.module = worker_manager
        self.base = worker_manager.WorkerLoRAManager
        self.cached = worker_manager.LRUCacheWorkerLoRAManager

    def restore(self) -> None:
        """Restore the classes and the method."""
        self.module.WorkerLoRAManager = self.base
        self.module.LRUCacheWorkerLoRAManager = self.cached
        if "_load_adapter" in vars(self.cached):
            del self.cached._load_adapter

    def replace_method(self) -> None:
        """Replace ``_load_adapter`` on the class that vLLM instantiates."""
        self.cached._load_adapter = load_from_memory

    def build_classes(self) -> Callable[[], None]:
        """Build classes that do not derive from vLLM's; return a function that puts them in place."""
        stock = {**vars(self.base), **vars(self.cached)}
        body = {name: value for name, value in stock.items() if not name.startswith("__")}
        body |= {"__init__": self.base.__init__, "_load_adapter": load_from_memory}
        base = type("WorkerLoRAManager", (), body)
        cached = type("LRUCacheWorkerLoRAManager", (base,), {"add_adapter": _add_adapter})

        def replace() -> None:
            self.module.WorkerLoRAManager, self.module.LRUCacheWorkerLoRAManager = base, cached

        return replace


def request(name: str, number: int, folder: Path, **fields: Any) -> Any:
    """Return a request with the tensors of a folder; unsloth's requests have no ``load_inplace``."""
    from safetensors.torch import load_file

    return SimpleNamespace(
        lora_name=name,
        lora_int_id=number,
        adapter_id=number,
        lora_path=str(folder),
        tensors=load_file(folder / "adapter_model.safetensors"),
        config=json.loads((folder / "adapter_config.json").read_text()),
        **fields,
    )


def load_from_memory(worker_manager: Any, lora_request: Any) -> Any:
    """Load the tensors of a request; a replacement of ``_load_adapter``."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(dict(lora_request.config))
    helper.validate_legal(worker_manager.lora_config)
    return LoRAModel.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=lora_request.tensors,
        peft_helper=helper,
        device="cpu",
        dtype=worker_manager.lora_config.lora_dtype,
        model_vocab_size=worker_manager.vocab_size,
    )


def _add_adapter(worker_manager: Any, lora_request: Any) -> bool:
    """Add an adapter as unsloth-zoo's manager does, which knows no ``load_inplace``."""
    manager = worker_manager._adapter_manager
    if lora_request.lora_int_id not in worker_manager.list_adapters():
        adapter = worker_manager._load_adapter(lora_request)
        if len(manager) + 1 > manager.capacity:
            manager.remove_oldest_adapter()
        manager.add_adapter(adapter)
    manager.activate_adapter(lora_request.lora_int_id)
    return True
