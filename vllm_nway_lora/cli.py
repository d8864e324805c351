# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-nway-lora``: whether the plugin is on, and how an adapter would be served."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_nway_lora import __version__
from vllm_nway_lora.diagnosis.options import ServerOptions, UsageError, validate_files

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_nway_lora.diagnosis.report import Report

_EXAMPLES = """examples:
  vllm-nway-lora doctor                           is the plugin on and exact on this machine?
  vllm-nway-lora check ./Qwen3.5-9B ./my-adapter  how would this adapter be served?
  vllm-nway-lora check ./model ./adapter --tensor-parallel-size 4 --fully-sharded-loras
  vllm-nway-lora plan ./model                     on what does this model take LoRA?

exit status:
  0  no fault
  1  something is not served exactly, or the plugin is not on
  2  wrong usage: an option, a folder or a file that cannot be read
  3  the command itself failed
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UsageError as error:
        print(f"vllm-nway-lora {options.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if options.debug:
            raise
        text = " ".join(str(error).split())
        print(
            f"vllm-nway-lora {options.command}: {type(error).__name__}: {text} (--debug shows where)",
            file=sys.stderr,
        )
        return 3


def _run(options: argparse.Namespace) -> int:
    if options.svg and not Path(options.svg).parent.is_dir():
        raise UsageError(f"--svg {options.svg}: there is no such folder")
    if options.command != "doctor":
        validate_files(options.model, getattr(options, "adapter", None))
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(f"vLLM is not installed for {sys.executable}")
    from rich.console import Console

    console = Console(record=options.svg is not None, width=options.width)
    if not options.debug:
        _silence()
    status: int = options.run(options, console)
    if options.svg:
        console.save_svg(options.svg, title=_title(options))
    return status


def _title(options: argparse.Namespace) -> str:
    """Return the command that a picture shows."""
    words = ["vllm-nway-lora", options.command]
    if options.command != "doctor":
        words += [options.model, *([options.adapter] if options.command == "check" else [])]
        if options.tensor_parallel_size > 1:
            words += ["-tp", str(options.tensor_parallel_size)]
    return " ".join(words)


def _parser() -> _Parser:
    parser = _Parser(
        "vllm-nway-lora",
        description="Show how vLLM, without and with this plugin, serves LoRA adapters. No engine is started.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-nway-lora {__version__}")
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument("--svg", metavar="FILE", help="also save the output as a picture")
    shared.add_argument("--width", type=_positive, help="width of the output in columns")
    shared.add_argument("--debug", action="store_true", help="show tracebacks and vLLM's log")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", parents=[shared], help="check this installation")
    doctor.set_defaults(run=_doctor)
    check = commands.add_parser(
        "check", parents=[shared, _server()], help="show how an adapter on a model would be served"
    )
    check.add_argument("adapter", help="a local folder with adapter_config.json and its tensors")
    check.set_defaults(run=_report)
    plan = commands.add_parser(
        "plan", parents=[shared, _server()], help="show on what a model takes LoRA, and the cost"
    )
    plan.set_defaults(run=_report)
    return parser


def _server() -> _Parser:
    """Return a parser of the model and of the server's options, by their names in ``vllm serve``."""
    server = _Parser(add_help=False)
    server.add_argument("model", help="a local folder with config.json; no weights are needed")
    group = server.add_argument_group("options of vllm serve")
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=_positive,
        default=1,
        metavar="N",
        help="the number of tensor-parallel ranks (default: 1)",
    )
    group.add_argument(
        "--fully-sharded-loras", action="store_true", help="shard LoRA-A over the ranks too"
    )
    group.add_argument(
        "--max-lora-rank",
        type=_positive,
        metavar="R",
        help="the highest rank of an adapter (default: the smallest value that is enough)",
    )
    group.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="the modules on which the server applies LoRA (default: all)",
    )
    group.add_argument(
        "--enable-tower-connector-lora",
        action="store_true",
        help="apply LoRA on towers and connectors of multimodal models",
    )
    group.add_argument(
        "--enable-mixed-moe-lora-format",
        action="store_true",
        help="serve adapters on experts of both formats, stacked and apart",
    )
    group.add_argument(
        "--model-impl", default="auto", metavar="NAME", help="auto, vllm or transformers"
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of the model's folder",
    )
    group.add_argument(
        "--hf-overrides",
        type=_json_object,
        metavar="JSON",
        help="settings that replace those of config.json, as a JSON object",
    )
    return server


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive number"  # argparse names the type by it


def _json_object(text: str) -> dict[str, Any]:
    if not isinstance(found := json.loads(text), dict):
        raise ValueError(text)
    return found


_json_object.__name__ = "JSON object"


def _silence() -> None:
    """Turn off the logs of vLLM and of what it imports, which would hide the answer."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only wait for the small products
    for name in ("vllm", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _doctor(options: argparse.Namespace, console: Console) -> int:
    from vllm_nway_lora.diagnosis import doctor, show_doctor

    report = doctor.examine()
    if options.json:
        print(json.dumps(dataclasses.asdict(report) | {"healthy": report.healthy}, indent=2))
    else:
        show_doctor.show(report, console)
    return 0 if report.healthy else 1


def _report(options: argparse.Namespace, console: Console) -> int:
    """Answer ``check`` or ``plan``."""
    from vllm_nway_lora.diagnosis import show
    from vllm_nway_lora.diagnosis.as_json import to_json

    report = _examine(options)
    if options.json:
        print(json.dumps(to_json(report), indent=2))
    elif options.command == "check":
        show.show_check(report, console)
    else:
        show.show_plan(report, console)
    # A model may have layers without LoRA; an adapter on such a layer is a fault.
    accepted = {"check": ("exact",), "plan": ("exact", "refused")}[options.command]
    return 0 if report.plugin.outcome.value in accepted else 1


def _examine(options: argparse.Namespace) -> Report:
    """Return the report on the command's model and adapter, from the cache if it is there."""
    names = [field.name for field in dataclasses.fields(ServerOptions)]
    given = {name: getattr(options, name) for name in names}
    if given["lora_target_modules"] is not None:
        given["lora_target_modules"] = tuple(given["lora_target_modules"])
    server = ServerOptions(**given)
    from vllm_nway_lora.diagnosis import cache

    key = cache.build_key(options.command, options.model, getattr(options, "adapter", None), server)
    if key and (found := cache.load(key)):
        return found
    report = _examine_anew(options, server)
    if key:
        cache.store(key, report)
    return report


def _examine_anew(options: argparse.Namespace, server: ServerOptions) -> Report:
    from rich.console import Console

    progress = Console(stderr=True)
    with progress.status("importing vLLM"):
        if options.command == "plan":
            from vllm_nway_lora.diagnosis.plan import plan_model
        else:
            from vllm_nway_lora.diagnosis.check import check_adapter
    if not options.debug:
        _silence()  # an import can set a logger's level
    with progress.status("building the model's layers"):
        if options.command == "plan":
            return plan_model(options.model, server)
        return check_adapter(options.model, options.adapter, server)
