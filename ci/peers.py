"""Run vLLM's own LoRA tests, unmodified, without the plugin and with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(release: str, python: Path, log: Path) -> dict[str, Any]:
    """Return counts."""
    raise NotImplementedError
