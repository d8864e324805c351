"""The API server's record of adapters."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from support.executors import Request

from vllm_nway_lora.engine import server


def test_server_clears_load_inplace() -> None:
    stored = Request(inplace=True)
    serving = SimpleNamespace(lora_requests={"a1": stored})

    async def load(request: Any) -> str:
        return f"loaded {request.lora_name}"

    request = SimpleNamespace(lora_name="a1")
    coroutine = server.reset_load_inplace(load, serving, (request,), {})
    assert asyncio.run(coroutine) == "loaded a1"
    assert not stored.load_inplace
