"""Measure the plugin's start-up time, with the plugin off and on in turn, in new processes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from machine import describe, write

#: Process in which register() is called -> the imports of vLLM that come first.
PROCESSES = {
    "import vllm": "import vllm, vllm.envs",
    "API server": "import vllm.entrypoints.openai.api_server",
    "worker": "import vllm.v1.worker.gpu_worker, vllm.lora.worker_manager",
}

#: Prints the wall-clock and CPU seconds that register() takes and the modules that it imports. In a
#: worker it applies the patches at once, and for that imports the modules that build LoRA layers.
CODE = """
import json, sys, time
{imports}
before = set(sys.modules)
started = time.perf_counter(), time.process_time()
import vllm_nway_lora
vllm_nway_lora.register()
wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
added = sorted(set(sys.modules) - before)
print(json.dumps({{"wall": wall, "processor": processor, "added": added}}))
"""


def measure(name: str, plugin: bool) -> dict[str, Any]:
    """Return time and imports of register() in a new process, with the plugin on or off."""
    environment = {
        **os.environ,
        "VLLM_NWAY_LORA": "1" if plugin else "0",
        "VLLM_PLUGINS": "",  # so that vLLM does not call register()
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users' processes find compiled bytecode
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE.format(imports=PROCESSES[name])],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Measure and save ``startup.json``; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES), choices=PROCESSES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    machine = describe()
    measure("import vllm", True)  # compiles the bytecode that later processes find
    rows = []
    for name in arguments.processes:
        found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for plugin in found:
                found[plugin].append(measure(name, plugin))
        row: dict[str, Any] = {"process": name}
        for plugin, label in ((False, "off"), (True, "on")):
            for clock in ("wall", "processor"):
                median = statistics.median(run[clock] for run in found[plugin])
                row[f"{label}_{clock}_ms"] = round(median * 1e3, 2)
            added = found[plugin][0]["added"]
            row[f"{label}_modules"] = len(added)
            row[f"{label}_torch_or_lora"] = [
                module for module in added if module.startswith(("torch", "vllm.lora"))
            ]
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.results / "startup.json", {"machine": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
