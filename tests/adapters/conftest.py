"""The fixture of tests on experts, which run in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vllm_nway_lora


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn the plugin on; it applies its patches where the worker's manager is imported."""
    import vllm.lora.worker_manager  # noqa: F401

    monkeypatch.setenv("VLLM_NWAY_LORA", "1")
    vllm_nway_lora.register()
    yield
    vllm_nway_lora.unregister()
