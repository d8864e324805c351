"""Make the environment of one vLLM release, with this package in it as a wheel.

Standard library only. Everything lies under a cache folder (``NWAY_LORA_CACHE``, by default
``~/.cache/vllm-nway-lora``); an environment that is there already is used again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("NWAY_LORA_CACHE", Path.home() / ".cache" / "vllm-nway-lora"))
TEST_REQUIREMENTS = ["peft>=0.17", "pytest>=8", "hypothesis>=6.100"]
LINT_REQUIREMENTS = ["ruff==0.14.0", "mypy==1.18.2", "packaging", "wrapt"]


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(f"[ci] {text}", flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command from the repository's root.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=env)


def uv() -> Path:
    """Return uv, installed into the cache folder if it is not there yet."""
    folder = CACHE / "uv"
    if not (folder / "bin" / "uv").exists():
        say("installing uv")
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv")
    return folder / "bin" / "uv"


def release_environment(release: str | None = None) -> Path:
    """Return the Python of a release's environment, made if need be, with a fresh wheel in it.

    Raises:
        KeyError: ``ci/matrix.toml`` has no such release.
        RuntimeError: installing the wheel changed a distribution that was there before.
    """
    matrix = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())
    release = release or str(matrix["default"])
    row = matrix["release"][release]
    pins = [f"torch=={row['torch']}", f"torchvision=={row['torchvision']}"]
    packages = [f"{row['distribution']}=={release}", "torchvision", *TEST_REQUIREMENTS]
    python = _environment(f"vllm-{release}", packages, pins)
    say(f"building the wheel and installing it beside vLLM {release}")
    wheels = CACHE / "wheels" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    run(uv(), "build", "--quiet", "--wheel", "--clear", "--out-dir", wheels)
    [wheel] = wheels.glob("*.whl")
    before = _distributions(python)
    run(uv(), "pip", "install", "--quiet", "--python", python, "--reinstall-package",
        "vllm-nway-lora", wheel)  # fmt: skip
    changed = before - _distributions(python)
    if changed:
        raise RuntimeError(f"installing the wheel changed {', '.join(sorted(changed))}")
    return python


def lint_environment() -> Path:
    """Return the Python of the environment with ruff and mypy."""
    return _environment("lint", LINT_REQUIREMENTS, [])


def _distributions(python: Path) -> set[str]:
    """Return every distribution but ours, as ``name==version``."""
    command = [str(uv()), "pip", "freeze", "--python", str(python)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line for line in listed.splitlines() if not line.startswith("vllm-nway-lora")}


def _environment(name: str, packages: list[str], pins: list[str]) -> Path:
    key = hashlib.sha256("\n".join([*packages, *pins]).encode()).hexdigest()[:12]
    folder = CACHE / "environments" / f"{name}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"making the environment {name} (once; the first takes some minutes)")
        run(uv(), "venv", "--quiet", "--clear", "--python", sys.executable, folder)
        overrides = folder / "overrides.txt"
        overrides.write_text("\n".join(pins) + "\n")
        run(uv(), "pip", "install", "--quiet", "--python", python, "--index-strategy",
            "unsafe-best-match", "--override", overrides, *packages)  # fmt: skip
        (folder / "complete").touch()
    return python
