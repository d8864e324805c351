# SPDX-License-Identifier: Apache-2.0
"""The text that ``doctor`` prints. Imports neither torch nor vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from vllm_nway_lora.diagnosis.show import break_path, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_nway_lora.diagnosis.doctor import PatchState, Report

_STYLES = {"on": "green", "replaced": "bold red", "aside": "bold red"}


def show(report: Report, console: Console) -> None:
    """Print a report; one line if vLLM is not installed."""
    for warning in report.warnings:
        console.print(f"[bold red]![/] {escape(warning)}", highlight=False)
    if not report.has_vllm:
        return
    console.print(
        "  ".join(f"{k} [bold]{escape(v)}[/]" for k, v in report.versions.items()),
        highlight=False,
    )
    if report.patches:
        rows = [
            (patch.name, break_path(patch.target.removeprefix("vllm."), 32), _describe(patch))
            for patch in report.patches
        ]
        console.print(_fill_table(("patch", "on vLLM's", "state"), rows))
    if report.defects:
        defects = [(name, escape(text.replace("`", ""))) for name, text in report.defects.items()]
        heading = ("defect of this release", "symptom, and upstream's threads")
        console.print(_fill_table(heading, defects))
    if report.by_table:
        stated = [(name, escape(text)) for name, text in report.by_table.items()]
        console.print(_fill_table(("by table on this release", "what the table states"), stated))
    if report.switched_on:
        names = ", ".join(report.switched_on)
        console.print(f"LoRA switched on for: {names}", highlight=False)
    for label, text in report.agreement.items():
        console.print(f"ranks, {label}: {escape(text)}", highlight=False)
    if report.selftest:
        exact = sum(result == "exact" for result in report.selftest.values())
        console.print(f"self-test: {exact} of {len(report.selftest)} layers exact", highlight=False)
    console.print("\nTo paste into an issue:", highlight=False)
    # Not wrapped, so that it is pasted as it is.
    console.print(report.issue, highlight=False, markup=False, soft_wrap=True)
    console.print(
        "\n[green]active, self-test passed[/]"
        if report.healthy
        else "\n[bold red]not active, or self-test failed[/]"
    )


def _describe(patch: PatchState) -> str:
    reason = "" if patch.state == "on" else patch.reason
    note = escape(": ".join(filter(None, [patch.state, reason])))
    note += f" (replaced before by {escape(patch.replaced_by)})" if patch.replaced_by else ""
    style = _STYLES.get(patch.state)
    return f"[{style}]{note}[/]" if style else note


def _fill_table(headings: tuple[str, ...], rows: list[Any]) -> Any:
    table = new_table(*headings)
    for row in rows:
        table.add_row(*row)
    return table
