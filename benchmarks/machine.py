"""The machine of a measurement, which is saved with every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any


def describe(device: str = "cpu") -> dict[str, Any]:
    """Return the machine, and the versions of Python, torch, vLLM and this package."""
    import torch
    import vllm

    import vllm_nway_lora

    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        lines = cpus.read_text().splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "vllm-nway-lora": vllm_nway_lora.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Save a result as JSON with one value per line, which keeps diffs readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def set_engine_environment(*, plugin: bool) -> None:
    """Set this process's variables for an engine on CPU, in this process and with one thread."""
    os.environ |= {
        "VLLM_NWAY_LORA": "1" if plugin else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
