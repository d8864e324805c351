"""What ``ci/demo.py`` runs: a tiny Qwen3.5, six adapters, a server without and with the plugin."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from rich.console import Console
from rich.table import Table
from support.adapters import QWEN3_5, Reference, prompts, save_adapter
from support.checkpoints import save_qwen3_5
from support.server import Server, ServerError


def main() -> int:
    """Print the table; return 0 if every adapter is exact with the plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    tp = parser.parse_args().tensor_parallel_size
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with console.status("making a tiny Qwen3.5 and its adapters"):
            checkpoint = save_qwen3_5(root / "model")
            adapters = {
                name: save_adapter(checkpoint, root / name, modules, seed)
                for seed, (name, modules) in enumerate(QWEN3_5.items())
            }
            reference = Reference(checkpoint, adapters)
        verdicts: dict[bool, dict[str, str]] = {}
        exact = True
        for plugin in (False, True):
            label = "with vllm-nway-lora" if plugin else "stock vLLM"
            verdicts[plugin] = {}
            console.print(f"starting the server, {label} (about a minute)")
            with Server(checkpoint, root / "log", plugin=plugin, tensor_parallel_size=tp) as server:
                for name, folder in adapters.items():
                    console.print(f"  {label}: adapter {name}")
                    try:
                        server.load(name, folder)
                        found = [
                            reference.compare(name, server.complete(name, prompt))
                            for prompt in prompts()
                        ]
                    except ServerError as error:
                        verdicts[plugin][name] = f"refused: {_cause(str(error))}"
                        exact = exact and not plugin
                        continue
                    worst = max(found, key=lambda comparison: comparison.error)
                    verdicts[plugin][name] = (
                        f"{'exact' if all(c.exact for c in found) else 'WRONG'}, "
                        f"error {worst.error:.2f} of {worst.effect:.2f}"
                    )
                    exact = exact and (not plugin or all(c.exact for c in found))
    table = Table(title="Qwen3.5 adapters: largest logprob error against PEFT, of the effect")
    table.add_column("adapter on")
    table.add_column("stock vLLM", overflow="fold")
    table.add_column("with vllm-nway-lora")
    for name in adapters:
        table.add_row(name, verdicts[False][name], verdicts[True][name])
    console.print(table)
    return 0 if exact else 1


def _cause(message: str) -> str:
    """Cut the server's message down to the worker's own words."""
    _, _, cause = message.partition("Worker failed with error '")
    return (cause.partition("', please")[0] or message)[:160]


if __name__ == "__main__":
    sys.exit(main())
