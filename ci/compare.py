"""Compare a server of stock vLLM with a server with the plugin, on tiny models, for ``ci/demo.py``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from rich.console import Console
from rich.table import Table
from support.adapters import QWEN3_5, QWEN3_NEXT, prompts, save_served_model
from support.checkpoints import save_qwen3_5, save_qwen3_next
from support.server import Server, ServerError

#: The word for an error that is bfloat16 noise.
MATCHES = "matches"


class Model(NamedTuple):
    """A model of the demo.

    Attributes:
        name: its name in the table.
        save: saves a tiny checkpoint into a folder and returns that folder.
        adapters: adapter's name -> its modules.
        tensor_parallel_size: the server's tensor-parallel size.
    """

    name: str
    save: Callable[[Path], Path]
    adapters: Mapping[str, Sequence[str]]
    tensor_parallel_size: int


MODELS = (
    Model("Qwen3.5", save_qwen3_5, QWEN3_5, 1),
    Model("Qwen3-Next", save_qwen3_next, QWEN3_NEXT, 2),
)


def main() -> int:
    """Print the table; return 0 if every adapter matches PEFT with the plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also save the table in this file")
    arguments = parser.parse_args()
    console = Console()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            console.print(f"{model.name}: saving a tiny checkpoint and its adapters")
            rows += compare(model, Path(folder) / model.name, console)
    table = Table(title="Largest logprob error compared with PEFT, of the adapter's largest effect")
    for heading in ("model", "adapter on", "stock vLLM", "with vllm-nway-lora", "noise"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["model"], row["adapter"], row["stock"], row["plugin"], row["noise"])
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["plugin"].startswith(MATCHES) for row in rows) else 1


def compare(model: Model, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Serve every adapter of a model without and with the plugin; return one row per adapter."""
    folder.mkdir()
    served = save_served_model(folder, model.save, model.adapters)
    verdicts: dict[bool, dict[str, str]] = {False: {}, True: {}}
    noise = 0.0
    for plugin, found in verdicts.items():
        label = "with vllm-nway-lora" if plugin else "stock vLLM"
        console.print(f"{model.name}: starting the server, {label} (about a minute)")
        with Server(
            served.folder,
            folder / "log",
            plugin=plugin,
            tensor_parallel_size=model.tensor_parallel_size,
        ) as server:
            base = [server.complete(server.models()[0], prompt) for prompt in prompts()]
            errors = (served.reference.compare(None, answer).error for answer in base)
            noise = max(noise, *errors)
            for name, path in served.adapters.items():
                try:
                    server.load(name, path)
                    answers = [server.complete(name, prompt) for prompt in prompts()]
                except ServerError as error:
                    found[name] = f"refused: {_cause(str(error))}"
                else:
                    worst = max(
                        (served.reference.compare(name, answer) for answer in answers),
                        key=lambda comparison: comparison.error,
                    )
                    outcome = MATCHES if worst.is_exact else worst.outcome.value
                    found[name] = f"{outcome}: {worst.error:.2f} of {worst.effect:.2f}"
                console.print(f"  {name}: {found[name]}")
    return [
        {
            "model": f"{model.name}, TP={model.tensor_parallel_size}",
            "adapter": " + ".join(modules) if len(modules) < 3 else "every projection",
            "stock": verdicts[False][name],
            "plugin": verdicts[True][name],
            "noise": f"{noise:.2f}",
        }
        for name, modules in model.adapters.items()
    ]


def _cause(message: str) -> str:
    """Return the worker's error out of the server's message, at most 160 characters."""
    _, _, cause = message.partition("Worker failed with error '")
    return (cause.partition("', please")[0] or message)[:160]


if __name__ == "__main__":
    sys.exit(main())
