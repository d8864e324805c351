"""Draw the pictures of the pages: ``python3 ci/pictures.py``.

Those of the command are at the shapes of published models.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import diagrams
import environment

#: Code that saves an adapter of rank 8 on the gated delta nets' ``in_proj_z`` of Qwen3.5-9B.
_SAVE_ADAPTER = """
import json
from pathlib import Path
import torch
from support.verdicts import save_adapter
text = json.loads(Path("Qwen3.5-9B/config.json").read_text())["text_config"]
rows = text["linear_num_value_heads"] * text["linear_value_head_dim"]
shapes = (8, text["hidden_size"]), (rows, 8)
layers = [n for n, kind in enumerate(text["layer_types"]) if kind == "linear_attention"]
Path("my-adapter").mkdir(exist_ok=True)
names = [f"model.language_model.layers.{n}.linear_attn.in_proj_z" for n in layers]
save_adapter(Path("my-adapter"), {name: tuple(map(torch.zeros, shapes)) for name in names})
"""
_MODELS = ("Qwen3.5-9B", "Granite-4.0-H-Micro")
PICTURES = {
    "doctor": ("doctor",),
    "check": ("check", "Qwen3.5-9B", "my-adapter", "-tp", "2"),
    "plan": ("plan", "Granite-4.0-H-Micro", "-tp", "2"),
}


def main() -> int:
    """Save every picture in ``docs/``; return 0. With ``diagrams``, save only those without vLLM."""
    docs = environment.ROOT / "docs"
    for name, draw in diagrams.DIAGRAMS.items():
        (docs / f"{name}.svg").write_text(draw())
    if sys.argv[1:] == ["diagrams"]:
        return 0
    python = environment.release_environment()
    work = environment.CACHE / "pictures"
    for model in _MODELS:
        (work / model).mkdir(parents=True, exist_ok=True)
        source = environment.ROOT / "tests" / "published" / f"{model}.json"
        shutil.copy(source, work / model / "config.json")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(environment.ROOT / "tests")}
    subprocess.run([python, "-P", "-c", _SAVE_ADAPTER], cwd=work, env=env, check=True)
    env.pop("PYTHONPATH")
    for name, arguments in PICTURES.items():
        environment.say(f"drawing {name}")
        picture = docs / f"{name}.svg"
        command = [str(python), "-P", "-m", "vllm_nway_lora", *arguments]
        # A picture may show a problem, for which the command exits with 1: not an error here.
        options = ["--svg", str(picture), "--width", "96"]
        subprocess.run([*command, *options], cwd=work, env=env, check=False)
        # The page's own fixed-width font, not one that is fetched.
        text = re.sub(r"@font-face \{.*?\}\s*", "", picture.read_text(), flags=re.DOTALL)
        picture.write_text(text.replace("Fira Code, monospace", "monospace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
