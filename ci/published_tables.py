"""The tables of docs/models.md, from the result that ``ci/published.py`` has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tables
import tomllib

ROOT = Path(__file__).resolve().parent.parent


def models() -> str:
    """Return the table of published models, from the result that ``ci/published.py`` has saved."""
    rows = [row for of in _published()["rows"].values() for row in of]
    # Sizes with the same words share a line.
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        words = [_published_words(row, side) for side in ("stock", "plugin")]
        parts = dict.fromkeys(
            _part(module) for modules in row["left out"].values() for module in modules
        )
        left_out = ", ".join(f"`{part}`" for part in parts)
        of_model = (row["model"], row["precision"], row["layers"])
        lines.setdefault((*of_model, row["adapter"], *words, left_out), []).append(row)
    cells = []
    for key, of in lines.items():
        figures = [", ".join(str(row[name]) for row in of) for name in ("seconds", "mib")]
        worker = "same" if not any("fault" in row for row in of) else "**differs**"
        sizes = ", ".join(str(row["tp"]) for row in of)
        cells.append((*key[:3], sizes, *key[3:], worker, *figures))
    headings = (
        *("model", "precision", "layers", "TP", "adapter", "stock vLLM", "with the plugin"),
        *("left out", "worker", "CPU s", "MiB"),
    )
    return tables.table(headings, cells)


def summary() -> str:
    """Return what the rows of published models say together."""
    result = _published()
    rows = [row for of in result["rows"].values() for row in of]
    lines = [f"{len({row['model'] for row in rows})} configurations, {len(rows)} rows."]
    for side, name in (("stock", "Stock vLLM"), ("plugin", "With the plugin")):
        outcomes = [row[side] for row in rows]
        counts = sorted({(-outcomes.count(outcome), outcome) for outcome in outcomes})
        lines.append(f"{name}: {', '.join(f'{-count} {outcome}' for count, outcome in counts)}.")
    same = sum("fault" not in row for row in rows)
    lines.append(f"The worker has the words of `check` on {same} of {len(rows)} rows.")
    return " ".join(lines) + "\n"


def _published() -> dict[str, Any]:
    release = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())["default"]
    found: dict[str, Any] = json.loads(
        (ROOT / "ci" / "results" / f"published-{release}.json").read_text()
    )
    return found


def _published_words(row: dict[str, Any], side: str) -> str:
    reason = row[f"{side} reason"].replace("|", "\\|")
    return tables.mark(f"{row[side]}: {reason}" if reason else row[side])


def _part(module: str) -> str:
    """Return the part of a model in which a module is."""
    names = [name for name in module.split(".") if name != "model"]
    return names[0]
