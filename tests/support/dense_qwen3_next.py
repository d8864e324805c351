"""A vLLM plugin that lets vLLM build a Qwen3-Next without experts: LoRA on experts needs Triton.

vLLM's class requires a layer with experts, only to read its expert-parallel settings. vLLM finds this
general plugin through the metadata in ``plugin/``, a folder on the servers' PYTHONPATH.
"""

from __future__ import annotations

from types import ModuleType

import wrapt


def register() -> None:
    """Replace ``set_moe_parameters`` of the model's class once vLLM imports its module."""

    @wrapt.when_imported("vllm.model_executor.models.qwen3_next")
    def skip_moe_parameters(module: ModuleType) -> None:
        module.Qwen3NextForCausalLM.set_moe_parameters = lambda self: None
