# SPDX-License-Identifier: Apache-2.0
"""The text of ``doctor`` to paste into an issue, without a path of this machine."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_nway_lora.diagnosis.doctor import Report

# A path from the root: its folders are private, its last part is not.
_PATH = re.compile(r"""(?<![\w./:~])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:()'",;]+)+[/\\]?""")


def write_text(report: Report) -> str:
    """Return versions, environment, warnings, the patches' states and the self-test as one text."""
    states = Counter(patch.state for patch in report.patches if patch.name != "-")
    exact = sum(result == "exact" for result in report.selftest.values())
    lines = [
        "  ".join(f"{name} {version}" for name, version in report.versions.items()),
        "  ".join(f"{name}={value}" for name, value in report.environment.items()),
        f"patches: {', '.join(f'{n} {state}' for state, n in states.items()) or 'none'}",
        *(
            f"  {patch.name} {patch.target}: {patch.state} {patch.reason} {patch.replaced_by}".rstrip()
            for patch in report.patches
            if patch.name == "-"
            or patch.replaced_by
            or patch.state not in ("on", "not needed here")
        ),
        f"self-test: {exact} of {len(report.selftest)} layers exact"
        if report.selftest
        else "self-test: not run",
        *(f"! {warning}" for warning in report.warnings),
    ]
    return "\n".join(remove_paths(line) for line in lines)


def remove_paths(text: str) -> str:
    """Return ``text`` with the last part of each absolute path only."""
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)
