"""The table of the adapters on a mixture of experts, for ``ci/readme.py``."""

from __future__ import annotations

import json
from pathlib import Path

import tables

RELEASE = "0.32.0"
RESULTS = Path(__file__).resolve().parent / "results"


def rows() -> str:
    """Return the table of the rows of ``tests/moe``.

    The plugin's outcome is that of the whole suite, which ``ci/matrix.py`` has saved: it passes only if
    every row is exact in every configuration.
    """
    from support.moe_adapters import ROWS
    from support.moe_checks import STOCK

    suite = json.loads((RESULTS / f"{RELEASE}.json").read_text())["suites"]["moe"]
    plugin = f"**{suite['failed']} tests failed**" if suite["failed"] else "exact"
    cells = [(name, tables.mark(STOCK[name].value), plugin) for name in ROWS]
    return tables.table(
        ("adapter (`ROW`)", f"stock vLLM {RELEASE}, TP 1", "with the plugin"), cells
    )
