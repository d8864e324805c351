"""The oracle: an adapter on each module alone against the same engine with merged weights.

vLLM is its own reference.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from support.oracle_engines import (
    AFTERWARDS,
    Answer,
    ChildError,
    call_in_fork,
    prepare,
    save,
    serve,
    serve_merged,
)
from support.oracle_families import FAMILIES
from support.oracle_family import Family

#: An error below this part of the adapter's effect is rounding. A row, a column or a scale that is
#: wrong makes an error of the size of its own effect. In float32 rounding is below 1e-4 of the
#: effect; in bfloat16 the merged weights are rounded too, and the limit is that
#: of ``support.adapters.Comparison``.
LIMITS = {"float32": 1 / 50, "bfloat16": 1 / 5}


def measure(family: Family, folder: Path, *, stock: bool = True) -> dict[str, Any]:
    """Return the results of one family, as ``ci/results`` has them.

    Args:
        family: the family.
        folder: an empty folder.
        stock: measure the cases also with the plugin off, if one is not exact with it.
    """
    started = time.monotonic()
    result: dict[str, Any] = {"dtype": family.dtype}
    try:
        shapes = call_in_fork(save, family, folder)
        found = call_in_fork(serve, family, folder, shapes, True)
        expected = call_in_fork(serve_merged, family, folder, shapes, found.together)
    except ChildError as error:
        return result | {"not_run": _summary(str(error))}
    result["modules"] = len(shapes)
    result["noise"] = _distance(
        found.base, expected.base
    )  # of the same model, with LoRA and without
    leftover = _distance(found.cases.pop(AFTERWARDS), found.base)
    result["afterwards"] = {"outcome": "exact" if leftover < 1e-3 else "wrong", "error": leftover}
    result["cases"] = {
        name: judge(answer, expected.cases[name], expected.base, family.dtype)
        for name, answer in found.cases.items()
    }
    if stock and any(
        case["outcome"] not in ("exact", "no effect") for case in result["cases"].values()
    ):
        try:
            alone = call_in_fork(serve, family, folder, shapes, False, found.together)
        except ChildError as error:
            result["stock_not_run"] = _summary(str(error))
        else:
            for name, case in result["cases"].items():
                answer = judge(alone.cases[name], expected.cases[name], expected.base, family.dtype)
                case["stock"] = answer["outcome"]
    return result | {"seconds": round(time.monotonic() - started)}


def judge(answer: Answer, expected: Answer, base: torch.Tensor, dtype: str) -> dict[str, Any]:
    """Return the outcome of one case and its figures.

    The outcome is ``exact``, ``wrong``, ``ignored`` (the base model answered), ``refused``,
    ``no effect`` (the module's weight does not change the reference) or ``no reference``.
    """
    if isinstance(answer, str):
        return {"outcome": "refused", "reason": answer}
    if isinstance(expected, str):
        return {"outcome": "no reference", "reason": expected}
    error, effect = _distance(answer, expected), _distance(expected, base)
    change = _distance(answer, base)
    figures = {"error": error, "effect": effect, "change": change}
    if effect < 1e-3:  # of this module, in this model
        return {"outcome": "no effect" if error < 1e-3 else "wrong", **figures}
    limit = LIMITS[dtype]
    if error < limit * effect:
        return {"outcome": "exact", **figures}
    return {"outcome": "ignored" if change < limit * effect else "wrong", **figures}


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    # A part of the vocabulary may be masked.
    difference = (one - other).abs().nan_to_num(nan=0.0 if bool(one.isinf().any()) else torch.inf)
    return float(f"{difference.max():.3g}")


def _summary(error: str) -> str:
    """Return the last line of a traceback that names an error."""
    lines = [
        line.strip()
        for line in error.splitlines()
        if re.match(r"[\w.]*\w+(Error|Exception)\b", line)
    ]
    return (lines or error.strip().splitlines() or ["no output"])[-1][:400]


def main(job: Mapping[str, Any]) -> int:
    """Measure families and write their results; return 1 if a case is not right, else 0.

    Args:
        job: ``families``, the names (none: all); ``results``, a folder; ``release``, for the file's
            name; ``stock``, whether cases that are not exact are measured with the plugin off too.
    """
    prepare()
    names = job["families"]
    path = Path(job["results"], f"oracle-{job['release']}.json")
    found = json.loads(path.read_text())["families"] if names and path.exists() else {}
    table = {family.name: family for family in FAMILIES}
    for family in [table[name] for name in names or table]:
        with tempfile.TemporaryDirectory() as folder:
            found[family.name] = result = measure(family, Path(folder), stock=job["stock"])
        print(describe(family.name, result), flush=True)
        path.write_text(json.dumps(summarize(found), indent=1) + "\n")
    return int(any(name in summarize(found)["counts"] for name in ("wrong", "ignored")))


def summarize(families: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of families with their counts."""
    counts: dict[str, int] = {"families": 0, "families not run": 0}
    for result in families.values():
        counts["families not run" if "not_run" in result else "families"] += 1
        afterwards = [result["afterwards"]] if "afterwards" in result else []
        for case in [*result.get("cases", {}).values(), *afterwards]:
            counts[case["outcome"]] = counts.get(case["outcome"], 0) + 1
    return {"counts": counts, "families": dict(families)}


def describe(name: str, result: Mapping[str, Any]) -> str:
    """Return the lines that say what was found of a family."""
    if "not_run" in result:
        return f"{name}: not run: {result['not_run']}"
    counts = summarize({name: result})["counts"]
    lines = [f"{name} ({result['seconds']} s, noise {result['noise']}): {counts}"]
    for case, found in {**result["cases"], AFTERWARDS: result["afterwards"]}.items():
        if found["outcome"] != "exact":
            lines.append(f"    {case}: {found}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
