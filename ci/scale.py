"""Load a server for longer, or run the suite ``tests/scale``.

``python3 ci/scale.py`` sends bursts to stock vLLM and to the plugin in turn, then disturbs one server
for ``--seconds`` (3600 by default), and writes ``ci/results/scale-RELEASE.json``. ``python3 ci/scale.py
tests`` runs the suite with Ray, which is installed in a folder of its own; other arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import environment

#: What Ray imports and vLLM's environment may lack.
RAY = ["ray==2.60.0", "msgpack", "filelock", "jsonschema", "click"]


def main() -> int:
    """Create the environment and run in it; return the exit status."""
    python = environment.release_environment()
    tests = environment.ROOT / "tests"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tests)}
    arguments = sys.argv[1:]
    if arguments[:1] == ["tests"]:
        command = ["-m", "pytest", *(arguments[1:] or ["tests/scale"])]
        variables |= {"NWAY_LORA_RAY": str(install_ray(python))}
    else:
        release = environment.matrix()["default"]
        result = environment.ROOT / "ci" / "results" / f"scale-{release}.json"
        command = ["-m", "support.scale_run", "--result", str(result)]
        command += arguments if "--seconds" in arguments else ["--seconds", "3600", *arguments]
    return subprocess.call(
        [python, "-P", *command], cwd=environment.ROOT, env=variables, stdin=subprocess.DEVNULL
    )


def install_ray(python: Path) -> Path:
    """Return the folder with Ray; vLLM's own environment stays without it."""
    folder = environment.CACHE / f"ray-{python.parent.parent.name}"
    if not (folder / "complete").exists():
        environment.say("installing Ray")
        environment.run(environment.uv(), "pip", "install", "--quiet", "--python", python,
                        "--no-deps", "--target", folder, *RAY)  # fmt: skip
        (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    sys.exit(main())
