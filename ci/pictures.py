"""Draw the README's pictures of the command: ``python3 ci/pictures.py``."""

from __future__ import annotations

import os
import subprocess
import sys

import environment

#: Code that saves two tiny models' configurations and an adapter for each. The pictures show the
#: names of the folders.
_SAVE_FILES = """
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
    """Save every picture in ``docs/``; return 0."""
    python = environment.release_environment()
    docs = environment.ROOT / "docs"
    docs.mkdir(exist_ok=True)
    work = environment.CACHE / "pictures"
    work.mkdir(exist_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(environment.ROOT / "tests")}
    subprocess.run([python, "-P", "-c", _SAVE_FILES], cwd=work, env=env, check=True)
    env.pop("PYTHONPATH")
    for name, arguments in PICTURES.items():
        environment.say(f"drawing {name}")
        command = [str(python), "-P", "-m", "vllm_nway_lora", *arguments]
        picture = ["--svg", str(docs / f"{name}.svg"), "--width", "110"]
        # A picture may show a problem, for which the command exits with 1: not an error here.
        subprocess.run([*command, *picture], cwd=work, env=env, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
