"""verl, ms-swift and ROLL: ``_load_adapter`` is replaced on the class that vLLM instantiates.

A request carries the tensors. The path of the request names nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from support.frameworks.framework import Framework, load_folder, load_tensors, read


class _TensorRequests(Framework):
    """What the three have in common.

    Attributes:
        path: the path of every request.
    """

    path: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.request_class: Any = self.module and self.module.TensorLoRARequest

    def patch(self) -> None:
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        self.request_class = request_class = _build_request_class()

        def load_adapter(worker_manager: Any, lora_request: Any) -> Any:
            if not isinstance(lora_request, request_class):
                return load_folder(worker_manager, lora_request)
            return load_tensors(
                worker_manager,
                lora_request.lora_int_id,
                lora_request.lora_tensors,
                lora_request.peft_config,
            )

        self.replace(LRUCacheWorkerLoRAManager, load_adapter)

    def replace(self, manager_class: Any, load_adapter: Any) -> None:
        """Put the method in its place."""
        manager_class._load_adapter = load_adapter

    def add(self, worker_manager: Any, number: int, folder: Path) -> None:
        tensors, config = read(folder)
        request = self.request_class(
            lora_name=str(number),
            lora_int_id=number,
            lora_path=self.path,
            peft_config=config,
            lora_tensors=tensors,
        )
        worker_manager.add_adapter(request)


def _build_request_class() -> Any:
    """Build a request with tensors, a subclass of vLLM's as it is in this process."""
    import msgspec
    from vllm.lora.request import LoRARequest

    fields: list[Any] = [("peft_config", dict | None, None), ("lora_tensors", dict | None, None)]
    return msgspec.defstruct("TensorLoRARequest", fields, bases=(LoRARequest,))


class Verl(_TensorRequests):
    name = "verl"
    source = "verl 0.9.1, verl/utils/vllm/utils.py (VLLMHijack.hijack)"
    path = "simon_lora_path"

    def patch(self) -> None:
        if self.module is None:
            super().patch()
            return
        import vllm

        self.module.get_version = lambda distribution: vllm.__version__.partition("+")[0]
        self.module.VLLMHijack.hijack()


class Swift(_TensorRequests):
    """It keeps the method that it finds, and replaces it once."""

    name = "ms-swift"
    source = "ms-swift 4.6.0, swift/rlhf_trainers/utils.py (patch_vllm_load_adapter)"
    path = "swift_dummy_lora_path"

    def patch(self) -> None:
        if self.module is None:
            super().patch()
        else:
            self.module.patch_vllm_load_adapter()

    def replace(self, manager_class: Any, load_adapter: Any) -> None:
        if not hasattr(manager_class, "_old_load_adapter"):
            manager_class._old_load_adapter = manager_class._load_adapter
            super().replace(manager_class, load_adapter)


class Roll(_TensorRequests):
    name = "roll"
    source = "alibaba/ROLL 005acba, roll/third_party/vllm/vllm_utils.py (patch_vllm_lora_manager)"
    path = "simon_lora_path"
