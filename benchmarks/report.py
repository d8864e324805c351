"""Write the tables of ``benchmarks/README.md`` and the plots from the saved results.

Run ``python3 benchmarks/run.py report`` or ``python3 benchmarks/report.py``. This script needs the
standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ci")]

import tables
from plots import bars

RESULTS = HERE / "results"
VARIANTS = ("stock", "slices", "plugin")


def main() -> int:
    """Write the tables and the plots; return 0."""
    readme = HERE / "README.md"
    readme.write_text(render(readme.read_text()))
    for name, draw in PLOTS.items():
        (RESULTS / name).write_text(draw())
    return 0


def render(text: str) -> str:
    """Return the text with every table replaced, between its two comments."""
    return tables.fill(text, TABLES, "report.py")


def load(name: str) -> dict[str, Any]:
    """Return a saved result; without rows if nothing is saved yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {"machine": {}, "rows": []}
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def machines() -> str:
    """Return the table of machines and versions, one line per result."""
    keys = ("date", "cpu", "cores", "threads", "clock", "load_before", "vllm", "torch")
    names = ("layers", "startup", "engine", "transformers_peft", "costs", "gpu")
    found = ((name, load(name)["machine"]) for name in names)
    rows = ((name, *(str(m.get(key) or "") for key in keys)) for name, m in found if m)
    return _table(("result", *keys), rows)


def layers() -> str:
    """Return the table of each layer's LoRA part: medians, and medians of the rounds' ratios."""
    headings = ("model", "TP", "r", "tokens", "adapters", "mode", "base, µs",
                *(f"{name}, µs" for name in VARIANTS), "slices / stock", "plugin / stock")  # fmt: skip
    rows = []
    for row in load("layers")["rows"]:
        times, ratios = row["lora_us"], row.get("lora_ratio", {})
        rows.append(
            (
                row["model"],
                *(str(row[k]) for k in ("tensor_parallel_size", "rank", "tokens", "adapters")),
                _mode(row),
                *(f"{times[name]:.0f}" if name in times else "–" for name in ("base", *VARIANTS)),
                *(f"{ratios[n]:.2f}" if n in ratios else "–" for n in VARIANTS[1:]),
            )
        )
    return _table(headings, rows)


def sizes() -> str:
    """Return the table of counts: multiply-adds / floor, and the plugin's bytes / stock vLLM's."""
    rows = []
    seen = set()
    for row in load("layers")["rows"]:
        key = row["model"], row["tensor_parallel_size"], row["fully_sharded"]
        found = row["sizes"]
        if key in seen or row["rank"] != 16 or row["tokens"] < 8:
            continue
        seen.add(key)
        stock, plugin = found.get("stock"), found["plugin"]
        floor = found["floor"]["multiply_adds"]

        def ratio(key: str, stock: Any = stock, plugin: Any = plugin) -> str:
            return f"{plugin[key] / stock[key]:.2f}" if stock and stock[key] else "–"

        rows.append(
            (
                row["model"],
                str(row["tensor_parallel_size"]),
                "sharded" if row["fully_sharded"] else "whole",
                f"{plugin['slices']} / {stock['slices'] if stock else 'not wrapped'}",
                f"{stock['multiply_adds'] / floor:.2f}" if stock else "–",
                f"{plugin['multiply_adds'] / floor:.2f}",
                *(ratio(key) for key in ("a_bytes", "b_bytes", "gathered_bytes")),
            )
        )
    return _table(
        ("model", "TP", "LoRA-A", "slices, plugin / stock", "multiply-adds, stock / floor",
         "multiply-adds, plugin / floor", "bytes of A, plugin / stock",
         "bytes of B, plugin / stock", "gathered bytes, plugin / stock"), rows)  # fmt: skip


def loads() -> str:
    """Return the table of the time that ``set_lora`` takes to write an adapter into a slot."""
    rows = []
    for row in load("layers")["rows"]:
        if row["tokens"] == 64 and row["adapters"] == 1 and not row["compiled"]:
            times, ratio = row["load_us"], row.get("load_ratio", {}).get("plugin")
            rows.append(
                (
                    row["model"],
                    *(str(row[k]) for k in ("tensor_parallel_size", "rank")),
                    "sharded" if row["fully_sharded"] else "whole",
                    *(f"{times[n]:.0f}" if n in times else "–" for n in ("stock", "plugin")),
                    "–" if ratio is None else f"{ratio:.2f}",
                )
            )
    return _table(("model", "TP", "r", "LoRA-A", "stock, µs", "plugin, µs", "plugin / stock"), rows)


def startup() -> str:
    """Return the table of register()'s time and imports in each process."""
    rows = []
    for row in load("startup")["rows"]:
        imported = ", ".join(row["on_torch_or_lora"]) or "none"
        figures = (
            f"{row[f'{s}_{c}_ms']:.1f}" for s in ("off", "on") for c in ("wall", "processor")
        )
        rows.append((row["process"], *figures, str(row["on_modules"]), imported))
    headings = ("imported before", "off, ms", "off, CPU ms", "on, ms", "on, CPU ms",
                "modules added when on", "of these torch or vllm.lora")  # fmt: skip
    return _table(headings, rows)


def engine() -> str:
    """Return the table of the engine: milliseconds per step, and the base's time / each side's."""
    rows = []
    for row in load("engine")["rows"]:
        times, ratios = row["ms"], row["of_base"]
        rows.append(
            (
                row["load"],
                str(row["adapters"]),
                *(f"{times[name]:.1f}" for name in ("base", "stock", "plugin")),
                *(f"{ratios[name]:.2f}" for name in ("stock", "plugin")),
                f"{row['speedup']:.2f}",
            )
        )
    headings = ("load", "adapters", *(f"{n}, ms/step" for n in ("base", "stock", "plugin")),
                "speed of stock / base", "speed of plugin / base", "speed of plugin / stock")  # fmt: skip
    return _table(headings, rows)


def transformers_peft() -> str:
    """Return the table of transformers with PEFT: milliseconds per step, and the base's time / LoRA's."""
    rows = []
    for row in load("transformers_peft")["rows"]:
        times = (f"{row['ms'][name]:.1f}" for name in ("base", "PEFT"))
        ratio = f"{row['of_base']['PEFT']:.2f}"
        rows.append((row["load"], str(row["adapters"]), *times, ratio))
    headings = ("load", "adapters", "transformers, ms/step", "with PEFT, ms/step",
                "speed of PEFT / transformers")  # fmt: skip
    return _table(headings, rows)


def costs() -> str:
    """Return the table of what requests and adapters cost the engine core, stock → plugin."""
    rows = []
    for row in load("costs")["rows"]:
        counts = ("rpcs", "file_system_calls")
        rows.append(
            (
                row["action"],
                *(f"{row['us'][name]:.0f}" for name in ("stock", "plugin")),
                *(f"{row[key]['stock']:g} → {row[key]['plugin']:g}" for key in counts),
            )
        )
    headings = ("action", "stock, µs", "plugin, µs", "calls to workers", "file-system calls")
    return _table(headings, rows)


def _mode(row: Mapping[str, Any]) -> str:
    sharded = ", sharded" if row["fully_sharded"] else ""
    return ("compiled" if row["compiled"] else "eager") + sharded


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    if not rows:
        return "Not measured yet.\n"
    return tables.table(headings, rows)


def draw_layers() -> str:
    """Return a plot of Qwen3.5-9B's LoRA part / base product by tokens: r = 16, one adapter."""
    chosen = [
        row
        for row in load("layers")["rows"]
        if (row["model"], row["tensor_parallel_size"], row["rank"], row["adapters"])
        == ("Qwen3.5-9B", 1, 16, 1)
        and not row["compiled"]
    ]
    groups = {
        f"{row['tokens']} token{'s' * (row['tokens'] > 1)}": {
            n: row["lora_us"][n] / row["lora_us"]["base"] for n in VARIANTS
        }
        for row in chosen
    }
    title = "Time of LoRA part / base product: Qwen3.5-9B in_proj_qkvz, r = 16, one adapter"
    return bars(title, "base product", groups)


def draw_engine() -> str:
    """Return a plot of the engine's speed with LoRA / its speed without, by load and adapters."""
    peers = {
        (row["load"], row["adapters"]): row["of_base"] for row in load("transformers_peft")["rows"]
    }
    groups = {
        f"{row['load']}: {row['adapters']} adapter{'s' * (row['adapters'] > 1)}": row["of_base"]
        | peers.get((row["load"], row["adapters"]), {})
        for row in load("engine")["rows"]
    }
    title = "Speed with LoRA on every projection / speed of the same software without LoRA, on CPU"
    return bars(title, "without LoRA", groups)


def gpu() -> str:
    """Return the table of the LoRA part on a GPU: microseconds, and the plugin's time / stock's."""
    rows = []
    for row in load("gpu")["rows"]:
        times, ratios = row["us"], row["ratio"]
        rows.append(
            (
                row["model"],
                row["layer"],
                f"{row['slices']['stock']} → {row['slices']['plugin']}",
                *(str(row[key]) for key in ("rank", "tokens", "adapters")),
                *(f"{times[key]:.0f}" for key in ("base", "lora stock", "lora plugin")),
                f"{ratios['lora']:.2f}",
                f"{ratios['layer']:.2f}",
            )
        )
    return _table(
        ("model", "layer", "slices", "r", "tokens", "adapters", "base, µs", "stock, µs",
         "plugin, µs", "plugin / stock", "whole layer, plugin / stock"), rows)  # fmt: skip


def launches() -> str:
    """Return the table of the programs that the kernels launch, stock → plugin."""
    rows = []
    for row in load("launches")["rows"]:
        sides = [row[name] for name in ("stock", "plugin")]
        counts = (
            " → ".join(str(side[kind]) for side in sides)
            for kind in ("slices", "shrink", "expand", "expand_with_work")
        )
        rows.append(
            (row["model"], row["layer"], *(str(row[k]) for k in ("tokens", "adapters")), *counts)
        )
    headings = ("model", "layer", "tokens", "adapters", "slices", "shrink", "expand",
                "expand with work")  # fmt: skip
    return _table(headings, rows)


TABLES: dict[str, Callable[[], str]] = {
    "machines": machines,
    "layers": layers,
    "sizes": sizes,
    "loads": loads,
    "startup": startup,
    "engine": engine,
    "transformers_peft": transformers_peft,
    "costs": costs,
    "gpu": gpu,
    "launches": launches,
}
PLOTS: dict[str, Callable[[], str]] = {"layers.svg": draw_layers, "engine.svg": draw_engine}


if __name__ == "__main__":
    sys.exit(main())
