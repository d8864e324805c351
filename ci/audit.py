"""Audit every class of a release's model registry that takes LoRA, and save one word per projection.

    python3 ci/audit.py 0.33.0              # writes ci/results/audit-0.33.0.json
    python3 ci/audit.py --diff 0.32.0 0.33.0

The words: ``exact`` (vLLM's own LoRA layer, its slots equal the trace), ``ours`` (this package's layer,
likewise), ``refused`` (with the reason), ``by table`` (no trace), ``no LoRA`` (vLLM wraps no such
layer), ``no weight`` (no checkpoint has one) and ``DIFFERS`` (the slots are not the trace's: a wrong
answer, and this command fails). Each model is built without memory, at tensor-parallel sizes 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment

WORDS = (
    *("exact", "ours", "refused", "by table", "no LoRA", "no weight"),
    *("DIFFERS", "cannot be built here"),
)
# A line has the words of two sizes, or of several configurations, if these are not the same.
_WORD = re.compile(rf"(?:^|TP \d: | and also )({'|'.join(WORDS)})")


def main() -> int:
    """Audit the releases, or compare two; return 1 if any projection differs from its trace."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("releases", nargs="*", metavar="RELEASE")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print what changed in words")
    parser.add_argument("--only", action="append", help="an architecture; print and save nothing")
    asked = parser.parse_args()
    if asked.diff:
        first, second = (json.loads(path(release).read_text()) for release in asked.diff)
        print("\n".join(compare(first, second)))
        return 0
    failed = False
    for release in asked.releases:
        result = run(release, asked.only or ())
        print(summary(release, result))
        failed |= any("DIFFERS" in word for _, word in lines(result))
    return 1 if failed else 0


def path(release: str) -> Path:
    """Return the path of a release's result."""
    return environment.ROOT / "ci" / "results" / f"audit-{release}.json"


def run(release: str, only: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Run the audit in a release's environment; save and return the result."""
    python = environment.release_environment(release)
    out = environment.CACHE / "logs" / release / "audit.json" if only else path(release)
    out.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # A process that has run a parallel region cannot be forked (libgomp).
    env |= {"PYTHONPATH": str(environment.ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    env |= environment.row(release).get("environment", {})
    command = [str(python), "-P", "-m", "support.audit", str(out), *only]
    subprocess.run(command, check=True, cwd=environment.ROOT, env=env)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each line's place, ``architecture layer: module``, and its word."""
    for architecture, words in result["architectures"].items():
        if isinstance(words, str):
            yield architecture, words
        else:
            yield from ((f"{architecture} {line}", word) for line, word in words.items())


def count(result: dict[str, Any]) -> Counter[str]:
    """Return how many lines have each word; a line can have several."""
    return Counter(word for _, text in lines(result) for word in set(_WORD.findall(text)))


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return one line per place whose word differs between two results."""
    before, after = first["architectures"], second["architectures"]
    found = [f"{name}: absent -> present" for name in sorted(after.keys() - before.keys())]
    found += [f"{name}: present -> absent" for name in sorted(before.keys() - after.keys())]
    old, new = dict(lines(first)), dict(lines(second))
    both = before.keys() & after.keys()
    return found + [
        f"{place}: {old.get(place, 'absent')} -> {new.get(place, 'absent')}"
        for place in sorted(old.keys() | new.keys())
        if old.get(place) != new.get(place) and place.partition(" ")[0] in both
    ]


def summary(release: str, result: dict[str, Any]) -> str:
    """Return a table of the counts, and the lines that differ."""
    built = sum(isinstance(words, dict) for words in result["architectures"].values())
    head = f"{release}: {built} of {len(result['architectures'])} classes that take LoRA were built"
    counts = count(result)
    table = [f"{counts[word]:6}  {word}" for word in WORDS]
    wrong = [f"{place}: {word}" for place, word in lines(result) if "DIFFERS" in word]
    return "\n".join([head, f"{result['takes no LoRA']:6}  classes take no LoRA", *table, *wrong])


if __name__ == "__main__":
    sys.exit(main())
