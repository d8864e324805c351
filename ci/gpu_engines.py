"""Serve adapters with real engines on a GPU and compare them with PEFT: ``python ci/gpu_engines.py``.

Run it in an environment with vLLM, PEFT, this package and a GPU. Tiny models of six architectures are
served eagerly, with CUDA graphs and with torch.compile, each in a process of its own. The result is
``ci/results/gpu-RELEASE.json``, and ``docs/releases.md`` shows it. vLLM's compiled extensions are not
needed: ``tests/support/gpu_standins.py`` replaces those that are missing. ``deepseek_v3`` needs them: its
attention has no other kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import gpu_engine, gpu_engine_models

LIMIT = 300  # seconds per engine


def main() -> int:
    """Run the engines and save the comparisons; return 0 if every adapter matches PEFT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=gpu_engine_models.EVERY, action="append")
    parser.add_argument("--mode", choices=list(gpu_engine.MODES), action="append")
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder, "models")
        wanted = asked.model or gpu_engine_models.EVERY
        gpu_engine_models.save(models, wanted)
        for model in wanted:
            for mode in asked.mode or gpu_engine_models.list_modes(model):
                results = Path(folder, f"{model}-{mode}.json")
                job = {"model": model, "mode": mode, "plugin": True, "results": str(results)}
                run_engine({**job, "folder": str(models / model)})
                found = json.loads(results.read_text()) if results.exists() else {}
                is_done = any(stage.startswith("done") for stage in found.get("reached", ()))
                (runs if is_done else failed).append(found or job)
        path = Path(folder, "runs.json")
        path.write_text(json.dumps(runs))
        rows = gpu_engine_models.compare(models, path)
    for run in failed:
        print(f"{run['model']} {run['mode']}: not served; reached {run.get('reached')}")
    if rows:
        saved = ROOT / "ci" / "results" / f"gpu-{rows[0]['vllm']}.json"
        saved.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed or any(row["outcome"] != "exact" for row in rows) else 0


def run_engine(job: dict[str, object]) -> None:
    """Run one engine in a process of its own; its results are in the job's file."""
    command = [sys.executable, "-P", "-m", "support.gpu_engine", json.dumps(job)]
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        print(f"{job['model']} {job['mode']}: over {LIMIT} s")


if __name__ == "__main__":
    sys.exit(main())
