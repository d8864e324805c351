"""A vLLM plugin that keeps vllm-nway-lora out of one TP rank, as on a node that lacks it.

``NWAY_TEST_RANK_WITHOUT_PLUGIN`` names the rank; without it this plugin does nothing. vLLM finds this
general plugin through the metadata in ``plugin/``, a folder on the servers' PYTHONPATH.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "NWAY_TEST_RANK_WITHOUT_PLUGIN"


def register() -> None:
    """Start the named rank with a ``VLLM_PLUGINS`` that excludes the plugin."""
    rank = os.environ.get(VARIABLE)
    if rank is None:
        return
    from vllm.v1.executor.multiproc_executor import WorkerProc

    make = WorkerProc.make_worker_process

    def make_worker_process(*args: Any, **kwargs: Any) -> Any:
        if kwargs["rank"] != int(rank):
            return make(*args, **kwargs)
        before = os.environ.get("VLLM_PLUGINS")
        os.environ["VLLM_PLUGINS"] = "fused_llama,dense_qwen3_next"
        try:
            return make(*args, **kwargs)
        finally:
            del os.environ["VLLM_PLUGINS"]
            if before is not None:
                os.environ["VLLM_PLUGINS"] = before

    if getattr(make, "__module__", "") != __name__:
        make_worker_process.__module__ = __name__
        WorkerProc.make_worker_process = staticmethod(make_worker_process)
