"""Run frameworks' own functions in place of our stand-ins: ``python3 ci/frameworks.py [NAME ...]``.

Each package of ``tests/support/frameworks/packages.py`` is installed without its dependencies in a
folder of its own in the cache folder, and ``tests/frameworks`` runs with it, on the release of vLLM for
which it was made. The outcomes are saved in ``ci/results/frameworks.json``, with the reason where a
package cannot be run. The exit status is 1 if a test fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import environment
import runner

sys.path.insert(0, str(environment.ROOT / "tests"))
from support.frameworks import packages

OUT = environment.ROOT / "ci" / "results" / "frameworks.json"

#: Projects of which only the stand-in is run -> the reason.
STAND_IN_ONLY = {
    "roll": "alibaba/ROLL is not on PyPI (`roll` is another project)",
    "gaudi": "vllm-gaudi is not on PyPI",
    "prime-rl": "prime-rl is not on PyPI, and its present releases have no such patch",
    "art": "openpipe-art 0.5.18 has no such patch; it loads adapters over HTTP",
    "metal": "vllm-metal on PyPI is 0.1.0, without a wheel for this Python, and needs mlx on macOS",
}

_LOAD = """
import sys
from support.frameworks.packages import PACKAGES
PACKAGES[sys.argv[1]].load(sys.argv[2])
"""


def main() -> int:
    """Run the packages, or those that are named; return 1 if a test fails."""
    names = sys.argv[1:] or list(packages.PACKAGES)
    rows: dict[str, Any] = json.loads(OUT.read_text())["packages"] if OUT.exists() else {}
    for name in names:
        rows[name] = run(name, packages.PACKAGES[name])
        environment.say(f"{name}: {rows[name].get('reason') or rows[name]['outcomes']}")
        ordered = {key: rows[key] for key in packages.PACKAGES if key in rows}
        result = {"packages": ordered, "stand_in_only": STAND_IN_ONLY}
        OUT.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row.get("failed") for row in rows.values()) else 0


def run(name: str, package: packages.Package) -> dict[str, Any]:
    """Install a package and run the tests with it; return its row."""
    release = package.release or str(environment.matrix()["default"])
    distribution, _, version = package.requirement.partition("==")
    row: dict[str, Any] = {"package": distribution, "version": version, "vllm": release}
    row |= {key: value for key, value in dataclasses.asdict(package).items() if value}
    del row["requirement"]
    row.pop("release", None)
    python = environment.release_environment(release)
    try:
        folder = install(python, package.requirement)
    except subprocess.CalledProcessError as error:
        return row | {"reason": f"it cannot be installed: {last_line(error.stderr)}"}
    env = {**os.environ, "PYTHONPATH": str(environment.ROOT / "tests")}
    command = [str(python), "-P", "-c", _LOAD, name, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return row | {"reason": f"it cannot be imported: {last_line(done.stderr)}"}
    log = environment.CACHE / "logs" / f"frameworks-{name}.log"
    log.parent.mkdir(exist_ok=True)
    given = json.dumps({name: str(folder)})
    report = runner.run_pytest(
        release, python, ["tests/frameworks"], log, NWAY_LORA_FRAMEWORKS=given, OMP_NUM_THREADS="1"
    )
    failed = runner.count(report)["failed"]
    outcomes = read_outcomes(report)
    if failed or not outcomes:
        print(log.read_text())
    return row | {"outcomes": outcomes, "failed": failed or int(not outcomes)}


def install(python: Path, requirement: str) -> Path:
    """Install a package without its dependencies; return its folder.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    folder = environment.CACHE / "frameworks" / requirement.replace("==", "-")
    if not (folder / "complete").exists():
        command = [environment.uv(), "pip", "install", "--quiet", "--no-deps", "--target", folder]
        command += ["--python", python, requirement]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return folder


def read_outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of each test per order of the patches: order -> test -> outcome."""
    if not report.exists():
        return {}
    outcomes: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = runner.outcome(case)
        found = re.fullmatch(r"test_(\w+)\[(.*)\]", str(case.get("name")))
        if outcome == "skipped" or found is None:  # a file without a test for this package
            continue
        test, parameters = found.groups()
        order = re.match("plugin first|framework first", parameters)
        of = outcomes.setdefault(order.group() if order else "either order", {})
        # Two stand-ins can have one package (vLLM-Ascend with one slot).
        if of.get(test) != "failed":
            of[test] = outcome
    return outcomes


def last_line(text: str) -> str:
    """Return the last line of an error, without the paths of this machine."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"/\S+/", "", lines[-1]) if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
