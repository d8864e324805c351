# SPDX-License-Identifier: Apache-2.0
"""The API server's record of adapters."""

from __future__ import annotations

from typing import Any


async def reset_load_inplace(wrapped: Any, serving: Any, args: Any, kwargs: Any) -> Any:
    """Clear ``load_inplace`` after the load; wraps ``OpenAIServingModels.load_lora_adapter``.

    Until 0.32.0 vLLM keeps the flag in the request that it stores under the adapter's name, and
    every step of every later request reloads the adapter from its files (fixed in 0.33.0).
    """
    result = await wrapped(*args, **kwargs)
    request = args[0] if args else kwargs["request"]
    stored = serving.lora_requests.get(request.lora_name)
    if stored is not None and stored.load_inplace:
        stored.load_inplace = False
    return result
