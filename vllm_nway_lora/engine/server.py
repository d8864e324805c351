# SPDX-License-Identifier: Apache-2.0
"""The API server's record of adapters, and the same adapter on all engines of a data-parallel server."""

from __future__ import annotations

import copy
from typing import Any


async def load_lora_adapter(wrapped: Any, serving: Any, args: Any, kwargs: Any) -> Any:
    """Load an adapter on all engines or on none; wraps ``OpenAIServingModels.load_lora_adapter``.

    Clears ``load_inplace`` afterwards: until 0.32.0 vLLM keeps the flag in the request that it stores
    under the adapter's name, and every step of every later request reloads the adapter (fixed in
    0.33.0). If a data-parallel engine refuses a replacement, the others have replaced the adapter
    already; they get the old one back, or all lose it if its files are the ones that were replaced.
    """
    request = args[0] if args else kwargs["request"]
    old = serving.lora_requests.get(request.lora_name)
    result = await wrapped(*args, **kwargs)
    error = getattr(result, "error", None)
    stored = serving.lora_requests.get(request.lora_name)
    if error is None and stored is not None:
        stored.load_inplace = False
    elif error is not None and getattr(request, "load_inplace", False) and old is not None:
        parallel_config = serving.engine_client.vllm_config.parallel_config
        if parallel_config.data_parallel_size > 1:
            error.message += await _restore(serving, request, old)
    return result


async def _restore(serving: Any, request: Any, old: Any) -> str:
    """Give all engines the old adapter, or take it from all; return a sentence for the message."""
    name = request.lora_name
    if request.lora_path != old.lora_path:
        again = copy.copy(old)
        again.load_inplace = True
        try:
            await serving.engine_client.add_lora(again)
        except Exception:
            pass
        else:
            return f" All engines serve adapter {name!r} from {old.lora_path}, as before."
    await serving.engine_client.remove_lora(old.lora_int_id)
    del serving.lora_requests[name]
    return (
        f" Some engines had replaced adapter {name!r} already, and its old files are gone: it has "
        "been removed from all engines. Load it again."
    )
