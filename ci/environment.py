"""Create the environment of one vLLM release and install this package in it as a wheel.

Uses the standard library only. All files are in a cache folder (``NWAY_LORA_CACHE``, by default
``~/.cache/vllm-nway-lora``). An existing environment is used again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("NWAY_LORA_CACHE", Path.home() / ".cache" / "vllm-nway-lora"))
# Hundreds of processes of the tests import vLLM, which takes twice the time without bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "bytecode")
TEST_REQUIREMENTS = ["peft>=0.17", "pytest>=8", "hypothesis>=6.100"]
LINT_REQUIREMENTS = [
    *("ruff==0.14.0", "mypy==1.18.2", "import-linter==2.17"),
    *("packaging", "wrapt"),
    *("twine==7.0.0", "check-wheel-contents==0.6.3", "pyroma==5.0.1"),
    *("zizmor==1.32.0", "check-jsonschema==0.39.0"),
    *("mkdocs==1.6.1", "mkdocs-material==9.8.2"),
]


def say(text: str) -> None:
    """Print one line of progress and flush it."""
    print(f"[ci] {text}", flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command from the repository's root.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=env)


def uv() -> Path:
    """Return the path of uv; install it in the cache folder if it is missing."""
    folder = CACHE / "uv"
    if not (folder / "bin" / "uv").exists():
        say("installing uv")
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv")
    return folder / "bin" / "uv"


@functools.cache
def matrix() -> dict[str, Any]:
    """Return the contents of ``ci/matrix.toml``."""
    return tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())


def row(release: str) -> dict[str, Any]:
    """Return a row of ``ci/matrix.toml``.

    ``release`` is a release, ``newest`` (the release published last) or ``python-3.12`` (a release on
    that version of Python).

    Raises:
        KeyError: the file has no such row.
    """
    rows: dict[str, dict[str, Any]] = {**matrix()["release"], "newest": matrix()["newest"]}
    for version, of in matrix()["python"].items():
        rows[f"python-{version}"] = {
            **{key: rows[of["release"]][key] for key in ("distribution", "torch")},
            "release": of["release"],
            "python": version,
        }
    return rows[release]


def repository() -> str:
    """Return the address of the repository, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["urls"]["Repository"])


def build(folder: Path) -> list[Path]:
    """Build the source distribution, and the wheel from it; return both files.

    The folder is emptied first.
    """
    run(uv(), "build", "--quiet", "--clear", "--out-dir", folder)
    return sorted(folder.glob("*.tar.gz")) + sorted(folder.glob("*.whl"))


@functools.cache
def wheel() -> Path:
    """Return the wheel under test: the file that ``NWAY_LORA_WHEEL`` names, else a new build."""
    if given := os.environ.get("NWAY_LORA_WHEEL"):
        return Path(given).resolve()
    say("building the wheel")
    folder = CACHE / "wheels" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    run(uv(), "build", "--quiet", "--wheel", "--clear", "--out-dir", folder)
    [built] = folder.glob("*.whl")
    return built


def release_environment(release: str | None = None) -> Path:
    """Return the Python of a release's environment, in which the wheel is installed.

    Create the environment if it is missing.

    Raises:
        KeyError: ``ci/matrix.toml`` has no such release.
        subprocess.CalledProcessError: the environment could not be created.
        RuntimeError: installing the wheel changed a distribution that was installed before.
    """
    release = release or str(matrix()["default"])
    wanted = row(release)
    pins, distribution = [], wanted["distribution"]
    if release != "newest":
        together = {"torch": wanted["torch"], **matrix()["torch"][wanted["torch"]]}
        pins = [f"{name}=={version}" for name, version in together.items()]
        distribution += f"=={wanted.get('release', release)}"
    packages = [distribution, "torchvision", *TEST_REQUIREMENTS]
    python = _environment(f"vllm-{release}", packages, pins, wanted.get("python", sys.executable))
    before = _distributions(python)
    run(uv(), "pip", "install", "--quiet", "--python", python, "--reinstall-package",
        "vllm-nway-lora", wheel())  # fmt: skip
    changed = before - _distributions(python)
    if changed:
        raise RuntimeError(f"installing the wheel changed {', '.join(sorted(changed))}")
    return python


def lint_environment() -> Path:
    """Return the Python of the environment with the linters and MkDocs."""
    return _environment("lint", LINT_REQUIREMENTS, [], sys.executable)


def _distributions(python: Path) -> set[str]:
    """Return every installed distribution except ours, as ``name==version``."""
    command = [str(uv()), "pip", "freeze", "--python", str(python)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line for line in listed.splitlines() if not line.startswith("vllm-nway-lora")}


def _environment(name: str, packages: list[str], pins: list[str], interpreter: str) -> Path:
    key = hashlib.sha256("\n".join([*packages, *pins, interpreter]).encode()).hexdigest()[:12]
    folder = CACHE / "environments" / f"{name}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"creating the environment {name} (once; the first one takes some minutes)")
        run(uv(), "venv", "--quiet", "--clear", "--python", interpreter, folder)
        overrides = folder / "overrides.txt"
        overrides.write_text("\n".join(pins) + "\n")
        run(uv(), "pip", "install", "--quiet", "--python", python, "--index-strategy",
            "unsafe-best-match", "--override", overrides, *packages)  # fmt: skip
        (folder / "complete").touch()
    return python
