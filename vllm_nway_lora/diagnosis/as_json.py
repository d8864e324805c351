# SPDX-License-Identifier: Apache-2.0
"""The JSON that ``check --json`` and ``plan --json`` print; docs/json.md describes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_nway_lora.diagnosis.report import Report, Row, Verdict

#: Increases when a field is renamed or removed, or changes its meaning. New fields do not count.
FORMAT = 1


def to_json(report: Report) -> dict[str, Any]:
    """Return a report as objects that ``json`` writes."""
    return {
        "format": FORMAT,
        "stock": _verdict(report.stock),
        "plugin": _verdict(report.plugin),
        "translated": report.rules,
        "left_out": report.left_out,
        "max_lora_rank": report.max_lora_rank,
        "costs": {side: dataclasses.asdict(cost) for side, cost in report.costs.items()},
        "layers": [_row(row) for row in report.rows],
    }


def _verdict(verdict: Verdict) -> dict[str, str]:
    return {"word": verdict.outcome.value, "reason": verdict.reason}


def _row(row: Row) -> dict[str, Any]:
    ranks = [
        {part.module: {"columns": part.width, "rows": len(part.local)} for part in plan.slices}
        for plan in row.plan
    ]
    plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "plan"}
    sides = {"stock": _verdict(row.stock), "plugin": _verdict(row.plugin)}
    return {**plain, **sides, "ranks": ranks}
