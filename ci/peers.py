"""Run vLLM's own LoRA tests, unmodified, with the plugin off and on."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import environment
import runner

#: The files of ``tests/lora`` that run on CPU. The others need a GPU or serve whole models.
FILES = (
    "test_layers.py",
    "test_layers_utils.py",
    "test_lora_manager.py",
    "test_lora_utils.py",
    "test_lora_weights.py",
    "test_peft_helper.py",
    "test_utils.py",
)


def run(release: str, python: Path, log: Path) -> dict[str, Any]:
    """Run a release's own tests with the plugin off and on; return the figures.

    ``failed`` counts the tests that pass with the plugin off and do not pass with it on; ``lost``
    lists them.
    """
    folder = fetch(release)
    # vLLM's conftest imports tblib.
    environment.run(environment.uv(), "pip", "install", "--quiet", "--python", python, "tblib")
    names = [f"tests/lora/{n}" for n in FILES if (folder / "tests" / "lora" / n).exists()]
    path = os.pathsep.join(str(environment.ROOT / "tests" / part) for part in ("", "peers"))
    outcomes: dict[str, dict[str, str]] = {}
    for mode in ("0", "1"):
        report = runner.run_pytest(
            release,
            python,
            ["-p", "upstream", "-q", *names],
            log.with_name(f"{log.stem}-{'on' if mode == '1' else 'off'}.log"),
            folder,
            PYTHONPATH=path,
            VLLM_NWAY_LORA=mode,
            OMP_NUM_THREADS="1",
        )
        outcomes[mode] = _outcomes(report)
    off, on = ({test for test, outcome in outcomes[m].items() if outcome == "passed"} for m in "01")
    lost = sorted(off - on)
    return {
        "passed": len(on),
        "failed": len(lost),
        "skipped": sum(outcome == "skipped" for outcome in outcomes["1"].values()),
        "passed_off": len(off),
        "failed_off": sum(outcome == "failed" for outcome in outcomes["0"].values()),
        "lost": lost,
    }


def fetch(release: str) -> Path:
    """Return a folder with ``tests/`` of a release's source distribution; fetch it if missing."""
    folder = environment.CACHE / "sdists" / release
    if not (folder / "tests").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [environment.uv(), "tool", "run", "unearth", "--no-binary", "--download", folder]
        subprocess.run(
            [str(part) for part in (*command, f"vllm=={release}")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        [archive] = folder.glob("*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                _, _, member.name = member.name.partition("/")
                if member.name.startswith("tests/"):
                    source.extract(member, folder, filter="data")
        archive.unlink()
    return folder


def _outcomes(report: Path) -> dict[str, str]:
    if not report.exists():
        return {}
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found[f"{case.get('classname')}::{case.get('name')}"] = runner.outcome(case)
    return found
