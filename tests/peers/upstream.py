"""A pytest plugin (``-p upstream``) that runs vLLM's own LoRA tests unmodified on CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

#: Beginning of a test's id -> why the test is left out.
LEFT_OUT = {
    "test_lora_manager.py::test_from_lora_tensors": "downloads an adapter",
    "test_lora_manager.py::test_lru_cache_worker_adapter_manager": "downloads an adapter",
    "test_lora_manager.py::test_worker_adapter_manager": "downloads an adapter",
    "test_peft_helper.py::test_peft_helper_pass": "downloads an adapter",
    "test_peft_helper.py::test_peft_helper_error": "downloads an adapter",
    "test_utils.py::test_get_adapter_absolute_path_huggingface": "asks the Hugging Face Hub",
    # Asserts that vLLM's class, by name, wraps layers that the plugin wraps.
    "test_layers.py::test_variable_slice_lora_class_selection": "asserts which class is used",
    # These take a minute or more each on two cores, and test layers that the plugin never wraps.
    "test_layers.py::test_embeddings": "vocabularies of 65,000 rows and more",
    "test_layers.py::test_lm_head_logits_processor": "vocabularies of 65,000 rows and more",
    "test_layers.py::test_vocab_parallel_embedding_indices": "vocabularies of 65,000 rows and more",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "skip_global_cleanup: a marker of vLLM's tests")
    # vLLM's fixtures call Ray even if it is not installed.
    ray: Any = ModuleType("ray")
    ray.shutdown = lambda: None
    ray.is_initialized = lambda: False
    sys.modules.setdefault("ray", ray)

    import vllm_nway_lora
    from vllm_nway_lora import settings
    from vllm_nway_lora.compat import registration

    vllm_nway_lora.register()

    import torch
    import vllm.lora.worker_manager  # noqa: F401  # this import applies the patches, as in a worker

    assert bool(registration.applied()) == (settings.read_mode() is not settings.Mode.OFF)

    from support.cpu import disable_pinned_memory
    from vllm.model_executor.layers import utils

    disable_pinned_memory()
    packed_gemm = utils.cpu_unquantized_gemm

    def gemm_of_unpacked_weights(layer: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        # vLLM packs weights for CPU when it loads them; these tests set weights without loading.
        if hasattr(layer, "cpu_linear"):
            return packed_gemm(layer, x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)

    utils.cpu_unquantized_gemm = gemm_of_unpacked_weights


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if item.nodeid.removeprefix("tests/lora/").startswith(tuple(LEFT_OUT))
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
