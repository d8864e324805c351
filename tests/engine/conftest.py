"""Fixtures for the tests of the engine subpackage."""

from __future__ import annotations

import pytest
from support.executors import Worker


@pytest.fixture(autouse=True)
def own_plain_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of plain Python count as vLLM's."""
    from vllm_nway_lora.adapters import hooks

    monkeypatch.setattr(hooks, "owns_manager", lambda manager: isinstance(manager, Worker))
