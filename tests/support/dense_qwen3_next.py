"""Let vLLM's processes build a Qwen3-Next without experts: LoRA on experts needs Triton.

Its class insists on a layer with experts only to tell expert parallelism of it. vLLM finds this as
a general plugin, through the metadata in ``plugin/``, which lies on the servers' PYTHONPATH.
"""

from __future__ import annotations

from types import ModuleType

import wrapt


def register() -> None:
    @wrapt.when_imported("vllm.model_executor.models.qwen3_next")
    def without_experts(module: ModuleType) -> None:
        module.Qwen3NextForCausalLM.set_moe_parameters = lambda self: None
