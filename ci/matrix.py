"""Run the suites on releases of vLLM and save the results.

    python3 ci/matrix.py                    # every release, except suites that have passed already
    python3 ci/matrix.py 0.21.0 0.24.0..    # one release; a range, which may be open on either side
    python3 ci/matrix.py --suite layers --again boundary
    python3 ci/matrix.py python             # the versions of Python; python-3.12 is one of them

Each release's figures are saved in ``ci/results/<release>.json``; the table of docs/releases.md
is written from these files. Each suite's output is saved in ``logs/`` in the cache folder. A suite that
has passed with the same code is not run again. A release that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import environment
import peers
import readme
import runner

Counts = dict[str, Any]


def main() -> int:
    """Run the suites that the arguments select; return 0 if every suite passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("releases", nargs="*", default=["all"], metavar="RELEASE | FIRST..LAST")
    parser.add_argument(
        "--suite", action="append", help="run only this suite; may be given more than once"
    )
    parser.add_argument(
        "--again", action="store_true", help="also run suites that have passed already"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 4))
    parser.add_argument(
        "--list", action="store_true", help="print the releases as JSON and run nothing"
    )
    asked = parser.parse_args()
    todo = select(asked.releases)
    if asked.list:
        print(json.dumps(todo))
        return 0
    environment.wheel()
    failed = []
    with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
        runs = {
            pool.submit(run_release, release, asked.suite, asked.again): release for release in todo
        }
        for done, run in enumerate(concurrent.futures.as_completed(runs), start=1):
            release = runs[run]
            try:
                passed = run.result()
            except Exception as error:
                environment.say(f"{release}: {type(error).__name__}: {error}")
                passed = False
            if not passed:
                failed.append(release)
            environment.say(
                f"{done} of {len(todo)} releases done, failed: {' '.join(failed) or '-'}"
            )
    readme.main()
    return 1 if failed else 0


def select(asked: Iterable[str]) -> list[str]:
    """Return the releases that ``asked`` selects, in the matrix's order.

    Raises:
        KeyError: the matrix has no release of that name.
    """
    known = [*environment.matrix()["release"], "newest"]
    pythons = [f"python-{version}" for version in environment.matrix()["python"]]
    chosen = set()
    for name in asked:
        first, dots, last = name.partition("..")
        if name == "all":
            chosen.update(known[:-1])
        elif name == "boundary":
            chosen.add(known[0])
            chosen.update(r for r in known[:-1] if environment.row(r).get("also"))
        elif name == "default":
            chosen.add(environment.matrix()["default"])
        elif name == "python":
            chosen.update(pythons)
        elif dots:
            start = known.index(first) if first else 0
            chosen.update(known[start : known.index(last) + 1 if last else -1])
        elif name in known or name in pythons:
            chosen.add(name)
        else:
            raise KeyError(f"ci/matrix.toml has no release {name}")
    return [release for release in [*known, *pythons] if release in chosen]


def suites(release: str) -> list[str]:
    """Return the suites of a release, in the order in which they run."""
    row = environment.row(release)
    if "release" in row:
        return ["quick"]
    everywhere = environment.matrix()["suites"]["everywhere"]
    return [*(s for s in everywhere if s not in row.get("without", [])), *row.get("also", [])]


def run_release(release: str, only: Sequence[str] | None, again: bool) -> bool:
    """Run a release's suites and save their figures; return whether all passed."""
    path = environment.ROOT / "ci" / "results" / f"{release}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"suites": {}}
    todo = [suite for suite in suites(release) if not only or suite in only]
    done = result["suites"]
    if not again:
        todo = [s for s in todo if s not in done or not passed(done[s], source(s, release))]
    if todo:
        python = environment.release_environment(release)
        result |= versions(python, release)
        path.parent.mkdir(exist_ok=True)
        for suite, counts in run_suites(release, python, todo):
            date = datetime.date.today().isoformat()
            done[suite] = counts | {"date": date, "source": source(suite, release)}
            environment.say(f"{release} {suite}: {summary(counts)}")
            result["suites"] = {name: done[name] for name in suites(release) if name in done}
            path.write_text(json.dumps(result, indent=2) + "\n")
    return all(not done[suite]["failed"] for suite in suites(release) if suite in done)


def run_suites(release: str, python: Path, todo: Sequence[str]) -> Iterator[tuple[str, Counts]]:
    """Run suites and yield their figures.

    ``peers`` runs vLLM's own tests.
    """
    log = environment.CACHE / "logs" / release / f"{'-'.join(todo)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment.say(f"{release}: running {' '.join(todo)} (log: {log})")
    for names in runner.split([suite for suite in todo if suite != "peers"]):
        own_log = log.with_name(f"{'-'.join(names)}.log")
        report = runner.run_pytest(release, python, runner.paths(names), own_log)
        for suite in names:
            yield suite, runner.count(report, runner.paths([suite]) if len(names) > 1 else ())
    if "peers" in todo:
        yield "peers", peers.run(release, python, log)


def passed(counts: Counts, code: str) -> bool:
    """Return whether a suite passed with this code."""
    return not counts["failed"] and counts["passed"] > 0 and counts["source"] == code


def source(suite: str, release: str) -> str:
    """Return a digest of all that a suite's figures depend on: the package, its tests and its row."""
    row = environment.row(release)
    digest = hashlib.sha256(json.dumps([row["distribution"], row.get("torch")]).encode())
    paths = environment.matrix()["suites"]["paths"].get(suite, ())
    digest.update(json.dumps(paths).encode() if "-k" in paths else b"")
    given = [path for path in paths if (environment.ROOT / path).exists()]
    folders = ["vllm_nway_lora", "tests/support", *given]
    if suite == "peers":
        folders.append("tests/peers")
    for name in folders:
        root = environment.ROOT / name
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def versions(python: Path, release: str) -> dict[str, str]:
    """Return the versions of Python, vLLM, torch, transformers, PEFT and this package."""
    distribution = environment.row(release)["distribution"]
    code = (
        "import json, platform; from importlib.metadata import version; print(json.dumps("
        "{'python': platform.python_version()} | {n: version(n) for n in "
        f"{[distribution, 'torch', 'transformers', 'peft', 'vllm-nway-lora']}}}))"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def summary(counts: Counts) -> str:
    """Return a suite's figures as text, for example ``3 passed, 1 skipped``."""
    kinds = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped") if counts[kind]]
    return ", ".join(kinds)


if __name__ == "__main__":
    sys.exit(main())
