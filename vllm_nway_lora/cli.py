# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-nway-lora``: whether the plugin is on, and how an adapter would be served."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_nway_lora.diagnosis import doctor as doctor_module
    from vllm_nway_lora.diagnosis.report import Report, Row, Verdict

_EXAMPLES = """examples:
  vllm-nway-lora doctor                           is the plugin on and exact on this machine?
  vllm-nway-lora check ./Qwen3.5-9B ./my-adapter  how would this adapter be served?
  vllm-nway-lora check ./model ./adapter --tensor-parallel-size 4 --fully-sharded-loras
  vllm-nway-lora plan ./model                     which projections does vLLM fuse?

exit status: 0 no fault; 1 something is not served exactly, or the plugin is not on; 2 wrong usage
"""
_STYLES = {
    "exact": "green",
    "on": "green",
    "refused": "yellow",
    "ignored": "red",
    "wrong": "bold red",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    # vLLM's own log would hide the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from rich.console import Console

    console = Console(record=options.svg is not None, width=options.width)
    status: int = options.run(options, console)
    if options.svg:
        console.save_svg(options.svg, title=f"vllm-nway-lora {options.command}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vllm-nway-lora",
        description="Diagnose LoRA on the projections that vLLM fuses N-way, without an engine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument("--svg", metavar="FILE", help="also save the output as a picture")
    shared.add_argument("--width", type=int, help="width of the output in columns")
    served = argparse.ArgumentParser(add_help=False)
    served.add_argument("model", help="a local folder with config.json")
    served.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    served.add_argument("--fully-sharded-loras", action="store_true")
    served.add_argument("--model-impl", default="auto", help="as for vllm serve")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", parents=[shared], help="check this installation")
    doctor.set_defaults(run=_doctor)
    check = commands.add_parser(
        "check", parents=[shared, served], help="show how an adapter on a model would be served"
    )
    check.add_argument("adapter", help="a local folder with adapter_config.json and its tensors")
    check.add_argument("--max-lora-rank", type=int)
    check.set_defaults(run=_check, also_accepted=())
    plan = commands.add_parser(
        "plan", parents=[shared, served], help="show a model's fused projections"
    )
    plan.set_defaults(run=_plan, also_accepted=("refused",))
    return parser


def _doctor(options: argparse.Namespace, console: Console) -> int:
    from vllm_nway_lora.diagnosis import doctor

    report = doctor.examine()
    if options.json:
        print(json.dumps(dataclasses.asdict(report) | {"healthy": report.healthy}, indent=2))
    else:
        _show_doctor(report, console)
    return 0 if report.healthy else 1


def _show_doctor(report: doctor_module.Report, console: Console) -> None:
    for warning in report.warnings:
        console.print(f"[bold red]![/] {warning}", highlight=False)
    console.print(
        "  ".join(f"{k} [bold]{v}[/]" for k, v in report.versions.items()), highlight=False
    )
    if report.patches:
        table = _table("patch", "on vLLM's", "state")
        for patch in report.patches:
            reason = "" if patch.state == "on" else patch.reason
            note = ": ".join(filter(None, [patch.state, reason]))
            note += f" (replaced before by {patch.replaced_by})" if patch.replaced_by else ""
            table.add_row(patch.name, patch.target.removeprefix("vllm."), _styled(note))
        console.print(table)
    if report.defects:
        table = _table("defect of this release", "symptom, and upstream's threads")
        for name, text in report.defects.items():
            table.add_row(name, text.replace("`", ""))
        console.print(table)
    if report.selftest:
        exact = sum(result == "exact" for result in report.selftest.values())
        console.print(f"self-test: {exact} of {len(report.selftest)} layers exact", highlight=False)
    console.print(
        "[green]active, self-test passed[/]"
        if report.healthy
        else "[bold red]not active, or self-test failed[/]"
    )


def _check(options: argparse.Namespace, console: Console) -> int:
    if not (
        _has_file(options.model, "config.json")
        and _has_file(options.adapter, "adapter_config.json")
    ):
        return 2
    from vllm_nway_lora.adapters.errors import AdapterError
    from vllm_nway_lora.diagnosis.check import check_adapter

    try:
        report = check_adapter(
            options.model,
            options.adapter,
            tensor_parallel_size=options.tensor_parallel_size,
            fully_sharded=options.fully_sharded_loras,
            model_impl=options.model_impl,
            max_lora_rank=options.max_lora_rank,
        )
    except AdapterError as error:
        print(f"{options.adapter}: {error}", file=sys.stderr)
        return 1
    return _answer(report, options, console)


def _plan(options: argparse.Namespace, console: Console) -> int:
    if not _has_file(options.model, "config.json"):
        return 2
    from vllm_nway_lora.diagnosis.plan import plan_model

    report = plan_model(
        options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        fully_sharded=options.fully_sharded_loras,
        model_impl=options.model_impl,
    )
    return _answer(report, options, console)


def _has_file(folder: str, file: str) -> bool:
    """Return whether ``folder`` has ``file``; if not, print how to fetch it.

    Called before vLLM is imported, which takes seconds.
    """
    found = Path(folder, file).is_file()
    if not found:
        print(
            f"{folder} is no local folder with {file}. Download a repository from the hub first, for "
            f"example with `hf download {folder} --include '*.json' 'adapter_model.safetensors'`, and "
            "pass the folder that it prints",
            file=sys.stderr,
        )
    return found


def _answer(report: Report, options: argparse.Namespace, console: Console) -> int:
    if options.json:
        print(json.dumps(_to_json(report), indent=2))
    else:
        _show_report(report, console)
    # A model may have layers without LoRA; an adapter on such a layer is a fault.
    return 0 if report.plugin.outcome.value in ("exact", *options.also_accepted) else 1


def _show_report(report: Report, console: Console) -> None:
    table = _table("layer", "modules (rows)", "r", "stock vLLM", "with the plugin")
    for row in report.rows:
        modules = ", ".join(
            f"{module} ({rows})" if rows is not None else f"[dim]{module}[/]"
            for module, rows in row.modules.items()
        )
        layer = f"{row.layer}{f'  x{row.count}' if row.count > 1 else ''}"
        rank = str(row.rank) if row.rank else ""
        outcomes = [_styled(side.outcome.value) for side in (row.stock, row.plugin)]
        if row.by_table:
            outcomes[1] += " (by table)"
        table.add_row(layer, modules, rank, *outcomes)
    console.print(table)
    for row in report.rows:
        if row.plan:
            console.print(_drawing(row))
    for rule in report.rules:
        console.print(f"translated: {rule}", highlight=False, markup=False)
    for reason, left_out in report.left_out.items():
        text = f"left out with a warning: {', '.join(left_out)} ({reason})"
        console.print(text, highlight=False, markup=False)
    for label, verdict in (("stock vLLM", report.stock), ("with the plugin", report.plugin)):
        reason = f" ({verdict.reason})" if verdict.reason else ""
        console.print(f"{label}: {_styled(verdict.outcome.value)}{reason}", highlight=False)


def _drawing(row: Row) -> str:
    """Return a drawing of each rank's fused output, with the module that writes each column."""
    name = row.layer.rpartition(".")[2]
    lines = [f"[bold]{name}[/]: each rank's output, {len(row.plan[0].slices)} slices"]
    width = sum(part.width for part in row.plan[0].slices)
    for number, plan in enumerate(row.plan):
        cells = []
        for part in plan.slices:
            adapted = row.modules.get(part.module) is not None
            cell = f" {part.module} {part.width} ".center(
                max(3, round(60 * part.width / width)), "·"
            )
            cells.append(f"[black on green]{cell}[/]" if adapted else f"[dim]{cell}[/]")
        lines.append(f"  rank {number} |{'|'.join(cells)}|")
    return "\n".join(lines)


def _to_json(report: Report) -> dict[str, Any]:
    def verdict(of: Verdict) -> dict[str, str]:
        return {"word": of.outcome.value, "reason": of.reason}

    def row(of: Row) -> dict[str, Any]:
        ranks = [
            {part.module: {"columns": part.width, "rows": len(part.local)} for part in plan.slices}
            for plan in of.plan
        ]
        fields = {f.name: getattr(of, f.name) for f in dataclasses.fields(of) if f.name != "plan"}
        sides = {"stock": verdict(of.stock), "plugin": verdict(of.plugin)}
        return {**fields, **sides, "ranks": ranks}

    return {
        "stock": verdict(report.stock),
        "plugin": verdict(report.plugin),
        "translated": report.rules,
        "left_out": report.left_out,
        "layers": [row(of) for of in report.rows],
    }


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _styled(text: str) -> str:
    style = _STYLES.get(text.split(":")[0].split(" ")[0])
    return f"[{style}]{text}[/]" if style else text
