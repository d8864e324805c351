# SPDX-License-Identifier: Apache-2.0
"""The text that ``check`` and ``plan`` print. Imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_nway_lora.diagnosis.report import DEFAULT_RANK, Outcome, Report, Row, Verdict

_STYLES = {
    Outcome.EXACT: "green",
    Outcome.REFUSED: "yellow",
    Outcome.IGNORED: "red",
    Outcome.WRONG: "bold red",
    Outcome.FAILS: "bold red",
    Outcome.UNKNOWN: "yellow",
}
#: The widest column of layers' names, in characters.
_LAYER = 28


def show_check(report: Report, console: Console) -> None:
    """Print how an adapter is served."""
    _show_rows(report.rows, console)
    for rule in report.rules:
        _say(console, f"translated: {rule}")
    for reason, modules in report.left_out.items():
        _say(console, f"left out with a warning: {', '.join(modules)} ({reason})")
    if report.max_lora_rank > DEFAULT_RANK:
        default = f"the default is {DEFAULT_RANK}"
        _say(console, f"the server needs --max-lora-rank {report.max_lora_rank} ({default})")
    for label, verdict in (("stock vLLM", report.stock), ("with the plugin", report.plugin)):
        _show_verdict(label, verdict, console)
    if report.left_out and report.plugin.outcome is Outcome.EXACT:
        console.print(Padding(Text("without the modules that are left out"), (0, 0, 0, 2)))


def show_plan(report: Report, console: Console) -> None:
    """Print what adapters can target, how it is served, and what it costs."""
    _show_rows([row for row in report.rows if row.is_fused or not _is_plain(row)], console)
    for label, side in (("stock vLLM", "stock"), ("with the plugin", "plugin")):
        verdict: Verdict = getattr(report, side)
        if verdict.outcome in (Outcome.FAILS, Outcome.UNKNOWN):
            _show_verdict(label, verdict, console)
            continue
        _say(console, Text.assemble("LoRA on this model, ", (label, "bold"), ":"))
        for outcome, reason, modules in group_modules(report.rows, side):
            text = Text.assemble((outcome.value, _STYLES[outcome]), f": {', '.join(modules)}")
            text.append(f" ({reason})" if reason else "")
            console.print(Padding(text, (0, 0, 0, 2)))
        if cost := report.costs.get(side):
            rank = report.max_lora_rank
            text = Text(f"cost of a slot at --max-lora-rank {rank}: {cost.slices} slices, ")
            text.append(f"{format_bytes(rank * cost.bytes_per_lora_rank)} on each GPU")
            console.print(Padding(text, (0, 0, 0, 2)))


def group_modules(rows: Iterable[Row], side: str) -> list[tuple[Outcome, str, list[str]]]:
    """Return the modules that adapters can have, by outcome and reason.

    Args:
        rows: the rows of a report.
        side: ``stock`` or ``plugin``.
    """
    found: dict[tuple[Outcome, str], dict[str, None]] = {}
    for row in rows:
        verdict: Verdict = getattr(row, side)
        reason = verdict.reason
        if not row.is_adaptable:
            reason = (
                f"a convolution, which PEFT leaves out; {reason}" if reason else "a convolution"
            )
        found.setdefault((verdict.outcome, reason), {}).update(dict.fromkeys(row.modules))
    order = list(Outcome)
    keys = sorted(found, key=lambda key: -order.index(key[0]))
    return [(outcome, reason, list(found[outcome, reason])) for outcome, reason in keys]


def format_bytes(size: int) -> str:
    """Return a size in the largest unit that gives a number of at least one."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def new_table(*headings: str) -> Table:
    """Return an empty table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _show_rows(rows: list[Row], console: Console) -> None:
    if rows:
        table = new_table("layer", "modules (rows)", "r", "stock", "plugin")
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)
    for row in rows:
        if row.plan and row.is_adaptable:
            _draw(row, console)


def _cells(row: Row) -> list[Text]:
    modules = [
        Text(f"{module} ({rows})") if rows is not None else Text(module, "dim" if row.rank else "")
        for module, rows in row.modules.items()
    ]
    layer = break_path(row.layer, _LAYER) + (f" x{row.count}" if row.count > 1 else "")
    outcomes = [_styled(side.outcome) for side in (row.stock, row.plugin)]
    if row.by_table:
        outcomes[1].append("\nby table")
    return [Text(layer), Text("\n").join(modules), Text(str(row.rank or "")), *outcomes]


def break_path(path: str, width: int) -> str:
    """Break a dotted path into lines of at most ``width``, so that no table breaks it within a name."""
    lines = [""]
    for part in path.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _draw(row: Row, console: Console) -> None:
    """Draw each rank's fused output, with the module that writes each column."""
    name = row.layer.rpartition(".")[2]
    count = len(row.plan[0].slices)
    noun = "slice" if count == 1 else "slices"
    _say(console, Text.assemble((name, "bold"), f": each rank's output, {count} {noun}"))
    width = sum(part.width for part in row.plan[0].slices)
    room = min(60, console.width - 12 - count)
    for number, plan in enumerate(row.plan):
        line = Text(f"  rank {number} |")
        for part in plan.slices:
            adapted = row.modules.get(part.module) is not None
            label = f" {part.module} {part.width} "
            cell = label.center(max(3, round(room * part.width / width)), "·")
            line.append(cell, "black on green" if adapted else "dim").append("|")
        console.print(line, no_wrap=True, crop=True, overflow="ellipsis")


def _is_plain(row: Row) -> bool:
    return row.stock.outcome is row.plugin.outcome is Outcome.EXACT and not row.by_table


def _show_verdict(label: str, verdict: Verdict, console: Console) -> None:
    _say(console, Text.assemble((label, "bold"), ": ", _styled(verdict.outcome)))
    if verdict.reason:
        console.print(Padding(Text(verdict.reason), (0, 0, 0, 2)))


def _styled(outcome: Outcome) -> Text:
    return Text(outcome.value, _STYLES[outcome])


def _say(console: Console, text: Any) -> None:
    console.print(text, highlight=False, markup=False)
