"""Draw the README's pictures of the command anew: ``python3 ci/pictures.py``."""

from __future__ import annotations

import os
import subprocess
import sys

import environment

#: Writes a model's configuration and an adapter; both are so small that only their names tell.
_MAKE = """
import json, sys
from pathlib import Path
import torch
from support.families import FAMILIES
from support.verdicts import save_adapter
for start, folder in (("Qwen3.5", "Qwen3.5"), ("Granite 4 hybrid, 1", "granite-4-h")):
    family = next(family for family in FAMILIES if family.name.startswith(start))
    model, adapter = Path(folder), Path(f"{folder}-adapter")
    model.mkdir(exist_ok=True)
    adapter.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(family.config))
    pairs = {
        module: (torch.zeros(8, fused.columns), torch.zeros(rows, 8))
        for fused in family.fused
        for module, rows in list(fused.modules.items())[-1:]
    }
    save_adapter(adapter, pairs)
"""

PICTURES = {
    "doctor": ("doctor",),
    "check": ("check", "Qwen3.5", "Qwen3.5-adapter", "-tp", "2"),
    "plan": ("plan", "granite-4-h", "-tp", "2"),
}


def main() -> int:
    """Save every picture below ``docs/``; return 0."""
    python = environment.release_environment()
    docs = environment.ROOT / "docs"
    docs.mkdir(exist_ok=True)
    work = environment.CACHE / "pictures"
    work.mkdir(exist_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(environment.ROOT / "tests")}
    subprocess.run([python, "-P", "-c", _MAKE], cwd=work, env=env, check=True)
    env.pop("PYTHONPATH")
    for name, words in PICTURES.items():
        environment.say(f"drawing {name}")
        command = [str(python), "-P", "-m", "vllm_nway_lora", *words]
        picture = ["--svg", str(docs / f"{name}.svg"), "--width", "110"]
        # Not every picture is of success, so the exit status says nothing here.
        subprocess.run([*command, *picture], cwd=work, env=env, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
