"""A pytest plugin under which vLLM's own LoRA tests run unmodified on CPU: ``-p upstream``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

#: Tests of vLLM's that are left out, by the beginning of their ids, and why.
LEFT_OUT = {
    "test_lora_manager.py::test_from_lora_tensors": "downloads an adapter",
    "test_lora_manager.py::test_lru_cache_worker_adapter_manager": "downloads an adapter",
    "test_lora_manager.py::test_worker_adapter_manager": "downloads an adapter",
    "test_peft_helper.py::test_peft_helper_pass": "downloads an adapter",
    "test_peft_helper.py::test_peft_helper_error": "downloads an adapter",
    "test_utils.py::test_get_adapter_absolute_path_huggingface": "asks the Hugging Face Hub",
    # Asserts by name that vLLM's class takes the layers that this package is for.
    "test_layers.py::test_variable_slice_lora_class_selection": "asserts which class is used",
    # A minute or more each on two cores, and of layers that this package never takes.
    "test_layers.py::test_embeddings": "vocabularies of 65,000 rows and more",
    "test_layers.py::test_lm_head_logits_processor": "vocabularies of 65,000 rows and more",
    "test_layers.py::test_vocab_parallel_embedding_indices": "vocabularies of 65,000 rows and more",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "skip_global_cleanup: vLLM's own")
    # vLLM's fixtures shut Ray down whether or not it is installed.
    ray: Any = ModuleType("ray")
    ray.shutdown = lambda: None
    ray.is_initialized = lambda: False
    sys.modules.setdefault("ray", ray)

    import vllm_nway_lora
    from vllm_nway_lora import patches, settings

    vllm_nway_lora.register()

    import torch
    import vllm.lora.worker_manager  # noqa: F401  # has the patches applied, as in any worker

    assert bool(patches.applied()) == (settings.read_mode() is not settings.Mode.OFF)

    from support.cpu import unpin
    from vllm.model_executor.layers import utils

    unpin()
    packed_gemm = utils.cpu_unquantized_gemm

    def gemm(layer: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        # These tests set weights that were never packed for CPU, as loading does.
        if hasattr(layer, "cpu_linear"):
            return packed_gemm(layer, x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)

    utils.cpu_unquantized_gemm = gemm


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [i for i in items if i.nodeid.removeprefix("tests/lora/").startswith(tuple(LEFT_OUT))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
