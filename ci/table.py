"""Make the README's tables of releases and defects: ``python3 ci/table.py [--check]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import environment

sys.path.insert(0, str(environment.ROOT))
BEGIN = "<!-- made by ci/table.py -->"
END = "<!-- end -->"


def main() -> int:
    """Write the tables, or with ``--check`` say whether they are as they should be."""
    if sys.argv[1:] != ["--check"]:
        write()
        return 0
    if README.read_text() == made():
        return 0
    print("README.md's tables are stale: run python3 ci/table.py")
    return 1


README = environment.ROOT / "README.md"


def write() -> None:
    """Write the tables into the README."""
    README.write_text(made())


def made() -> str:
    """Return the README with its tables made anew.

    Raises:
        ValueError: the README has not the two marks.
    """
    before, found, rest = README.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return "\n".join([f"{before}{BEGIN}", "", *releases(), "", *defects(), "", f"{END}{after}"])


def results() -> dict[str, dict[str, Any]]:
    """Return every release's results, in the matrix' order."""
    folder = environment.ROOT / "ci" / "results"
    found = {release: folder / f"{release}.json" for release in environment.matrix()["release"]}
    return {r: json.loads(path.read_text()) for r, path in found.items() if path.exists()}


def releases() -> Iterator[str]:
    """Yield the lines of the table of releases."""
    yield from _rows(
        ["vLLM", "torch", "Python", "unit", "layers", "engine, TP=2", "vLLM's own, off → on"],
        (
            [
                release,
                result["torch"],
                result["python"],
                _figure(result, "unit"),
                _figure(result, "layers"),
                _figure(result, "engine"),
                _peers(result),
            ]
            for release, result in results().items()
        ),
    )


def _figure(result: dict[str, Any], suite: str) -> str:
    counts = result["suites"].get(suite)
    if counts is None:
        return "–"
    return f"{counts['passed']}" + (f", **{counts['failed']} failed**" if counts["failed"] else "")


def _peers(result: dict[str, Any]) -> str:
    counts = result["suites"].get("peers")
    return "" if counts is None else f"{counts['passed_off']} → {_figure(result, 'peers')}"


def defects() -> Iterator[str]:
    """Yield the lines of the table of defects."""
    from vllm_nway_lora.releases import DEFECTS

    yield from _rows(
        ["stock vLLM", "says", "releases", "upstream"],
        (
            [
                defect.user_sees,
                "<br>".join(f"`{message}`" for seen in defect.seen for message in seen.messages),
                "<br>".join(f"{seen.first} – {seen.last or ''}".strip() for seen in defect.seen),
                " ".join(
                    f"[{thread}](https://github.com/vllm-project/vllm/issues/{thread[1:]})"
                    for thread in defect.upstream
                ),
            ]
            for defect in DEFECTS
        ),
    )


def _rows(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
