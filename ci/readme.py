"""Write the tables of the README and of ``docs`` from their data: ``python3 ci/readme.py``.

A test fails if a page and the data differ. The families' data refers to objects of vLLM, so this
script runs in the environment of the default release.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "ci" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "ci"), str(ROOT / "tests")]

import moe_table  # noqa: E402  # found by the path above
import published_tables  # noqa: E402
import tables  # noqa: E402


def main() -> int:
    """Rewrite every table; return 0."""
    if importlib.util.find_spec("vllm") is None:
        import environment

        environment.run(environment.release_environment(), "-P", __file__)
        return 0
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text(), page))
    return 0


def render(text: str, page: str = "README.md") -> str:
    """Return a page's text with every generated part replaced, between its two comments."""
    return tables.fill(text, PAGES[page], "ci/readme.py")


def install() -> str:
    """Return the commands that install the plugin from its repository and serve a model."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    clone = f"git clone {project['urls']['Repository']} && pip install ./{project['name']}"
    lines = (
        "# not on PyPI yet",
        clone,
        "vllm serve MODEL --enable-lora   # as before: no further setting is needed",
    )
    return "".join(f"\n    {line}" for line in lines) + "\n\n"


def demo() -> str:
    """Return the table of the last saved results of ``ci/demo.py``."""
    rows = json.loads((RESULTS / "demo.json").read_text())
    return tables.table(
        ("served model", "adapter on", "stock vLLM 0.32.0", "with the plugin", "base model"),
        (
            (
                r["model"],
                r["adapter"],
                # The error's first words; the whole text would make the table too wide.
                tables.mark(r["stock"].partition(" with ")[0]),
                r["plugin"],
                r["noise"],
            )
            # What differs from stock vLLM comes first.
            for r in sorted(rows, key=lambda r: r["stock"].startswith("matches"))
        ),
    )


def families() -> str:
    """Return the table of model families, from the families of the tests."""
    from support.families import FAMILIES

    outcomes = []
    # Families with the same lines share them in the table.
    labels_by_lines: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for family in FAMILIES:
        lines = []
        for fused in family.fused:
            modules = ", ".join(module.rpartition(".")[2] for module in fused.modules)
            name = fused.layer.rpartition(".")[2]
            seen = "itself" if modules == name else modules
            # Stock vLLM is no longer measured on a family that newer releases do not have.
            stock = (
                ("",) * 4
                if family.until
                else (tables.mark(outcome.value) for outcome in fused.stock)
            )
            outputs = f"{len(fused.modules)} → {fused.n_outputs}"
            lines.append((f"`{name}`", seen, outputs, *stock, fused.plugin.value))
            outcomes.append(fused.plugin.value)
        label = f"{family.name} (to {family.until})" if family.until else family.name
        labels_by_lines.setdefault(tuple(dict.fromkeys(lines)), []).append(label)
    rows = [
        ("; ".join(labels), *line) for lines, labels in labels_by_lines.items() for line in lines
    ]
    headings = ("family", "fused projection", "adapter's modules", "modules → outputs")
    modes = ("TP=1", "TP>1", "sharded, TP=1", "sharded, TP>1")
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("exact", "refused"))
    assert set(outcomes) == {"exact", "refused"}
    return (
        f"{len(FAMILIES)} families, {len(outcomes)} fused projections; with the plugin {counts}.\n\n"
        f"{tables.table((*headings, *modes, 'plugin'), rows)}"
    )


#: Suites that run on the last releases only -> their headings.
SINCE_0_2 = {
    "check": "check",
    "frameworks": "frameworks",
    "moe": "experts, engines",
    "quantised_engines": "quantised bases",
    "gpu_kernels": "GPU kernels",
    "gpu_families": "families on GPU kernels",
    "upstream": "docs/upstream",
}


def releases() -> str:
    """Return the table of releases, from the figures that ``ci/matrix.py`` has saved."""
    known = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())["release"]
    rows = []
    found = [json.loads(path.read_text()) for path in RESULTS.glob("[0-9]*.json")]
    ran = {suite for result in found for suite in result["suites"]}
    later = {suite: heading for suite, heading in SINCE_0_2.items() if suite in ran}
    columns = ("unit", "layers", "engine", "stock", *later)
    for release in known:
        path = RESULTS / f"{release}.json"
        if path.exists():
            result = json.loads(path.read_text())
            figures = (_figure(result["suites"].get(suite)) for suite in columns)
            peers = result["suites"].get("peers")
            own = f"{peers['passed_off']} → {_figure(peers)}" if peers else ""
            rows.append((release, result["torch"], result["python"], *figures, own))
    headings = ("unit", "layers", "engine, TP=2", "stock's defects", *later.values())
    own_tests = "vLLM's own tests, off → on"
    return tables.table(("vLLM", "torch", "Python", *headings, own_tests), rows)


def pythons() -> str:
    """Return the table of the versions of Python, from the figures that ``ci/matrix.py`` has saved."""
    rows = []
    for version, of in tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())["python"].items():
        path = RESULTS / f"python-{version}.json"
        if path.exists():
            result = json.loads(path.read_text())
            suites = result["suites"]
            rows.append((result["python"], of["release"], *map(_figure, suites.values())))
    return tables.table(("Python", "vLLM", "tests"), rows)


def _figure(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "–"
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    return f"{counts['passed']}{failed}"


def defects() -> str:
    """Return the table of stock vLLM's defects."""
    from vllm_nway_lora.compat.defects import DEFECTS

    rows = []
    for defect in DEFECTS:
        threads = (
            f"[{thread}](https://github.com/vllm-project/vllm/issues/{thread[1:]})"
            for thread in defect.upstream
        )
        seen = (
            f"{s.first} to {s.last or 'now'}"
            + "".join(f"<br>`{message}`" for message in s.messages)
            for s in defect.seen
        )
        rows.append((defect.user_sees, "<br>".join(seen), " ".join(threads), defect.retired_by))
    return tables.table(
        ("defect of stock vLLM", "releases and error text", "upstream", "fixed upstream by"), rows
    )


def upstream() -> str:
    """Return the index of the pages of docs/upstream: first the defects that vLLM does not report."""
    from support.upstream import code_of, pages

    from vllm_nway_lora.compat.defects import find

    rows = []
    for name, page in pages().items():
        heading = page.read_text().splitlines()[0].removeprefix("# ")
        defect = find(name)
        seen = " ".join(f"`{message}`" for message in defect.seen[-1].messages) or "none"
        fix = "code" if len(code_of(page)) == 2 else "words"
        rows.append((f"[{heading}]({page.name})", seen, " ".join(defect.upstream), fix))
    rows.sort(key=lambda row: row[1] != "none")
    return tables.table(("page", "error text", "threads", "fix as"), rows)


def layouts() -> str:
    """Return the table of adapters' layouts, from those that the tests write."""
    from support.layout_table import LAYOUTS

    rows = [(of.name, of.producer, of.served) for of in LAYOUTS if of.served]
    return tables.table(("layout", "written by", "served"), rows)


def expert_layouts() -> str:
    """Return the table of experts' layouts, from those that the tests write."""
    from support.layout_table import EXPERTS

    return tables.table(("layout", "written by"), EXPERTS.values())


def variants() -> str:
    """Return the table of PEFT's variants that are plain LoRA in another form."""
    from support.layout_table import FOLDED

    return tables.table(
        ("`peft_type` or setting", "how"), ((f"`{name}`", how) for name, how in FOLDED.items())
    )


def refusals() -> str:
    """Return the table of kinds and settings that are refused, with the reasons of the errors."""
    from vllm_nway_lora.adapters.config import REFUSED_KEYS, REFUSED_KINDS

    reasons = {**REFUSED_KINDS, **REFUSED_KEYS}
    return tables.table(
        ("`peft_type` or setting", "why"),
        ((f"`{name}`", f"{why}.") for name, why in reasons.items()),
    )


def gpu_engines() -> str:
    """Return the table of engines on a GPU, from the results that ``ci/gpu_engines.py`` has saved."""
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("gpu-*.json")):
        for row in json.loads(path.read_text()):
            if row["side"] == "plugin":
                lines.setdefault((row["vllm"], row["card"], row["model"], row["mode"]), []).append(
                    row
                )
    cells = []
    for key, rows in lines.items():
        adapted = [row for row in rows if row["adapter"]]
        noise = max(row["error"] for row in rows if not row["adapter"])
        exact = sum(row["outcome"] == "exact" for row in adapted)
        # Adapters that were refused have no effect.
        worst = max((r["error"] / r["effect"] for r in adapted if r["effect"]), default=0.0)
        cells.append((*key, f"{exact} of {len(adapted)}", f"{worst:.2f}", f"{noise:.2f}"))
    headings = (
        "vLLM",
        "card",
        "model",
        "mode",
        "match PEFT",
        "largest error / effect",
        "base's noise",
    )
    return tables.table(headings, cells)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"install": install, "demo": demo},
    "docs/families.md": {"families": families},
    "docs/releases.md": {
        "releases": releases,
        "pythons": pythons,
        "experts": moe_table.rows,
        "gpu engines": gpu_engines,
        "defects": defects,
    },
    "docs/models.md": {"summary": published_tables.summary, "models": published_tables.models},
    "docs/upstream/index.md": {"upstream": upstream},
    "docs/layouts.md": {
        "layouts": layouts,
        "expert layouts": expert_layouts,
        "variants": variants,
        "refusals": refusals,
    },
}


if __name__ == "__main__":
    sys.exit(main())
