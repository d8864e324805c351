# SPDX-License-Identifier: Apache-2.0
"""Compare the plugin's version, setting and patches between the processes of an engine. Engine core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_nway_lora import __version__, settings


class RankError(RuntimeError):
    """The ranks of one engine do not run the same plugin."""


def start_engine(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> None:
    """Start the engine, then compare the ranks; wraps ``EngineCore.__init__``.

    Raises:
        RankError: LoRA is on, and a worker lacks the plugin or has another version or setting.
    """
    wrapped(*args, **kwargs)
    if engine.vllm_config.lora_config is not None:
        reports = engine.model_executor.collective_rpc(_reporter())
        message = compare_ranks(reports)
        if message:
            engine.model_executor.shutdown()
            raise RankError(message)


def compare_ranks(reports: Sequence[tuple[str, str, tuple[str, ...]] | None]) -> str:
    """Return how the ranks' reports (see :func:`_reporter`) differ; empty if they agree.

    Args:
        reports: per rank ``(plugin version, VLLM_NWAY_LORA, names of patches in place)``, or None
            where the plugin was not loaded.
    """
    own = (__version__, settings.read_mode().value)
    if all(report and report[:2] == own for report in reports) and len(set(reports)) == 1:
        return ""
    ranks = "; ".join(
        f"rank {rank}: "
        + (
            f"{report[0]} ({settings.VARIABLE}={report[1]}; patches: {', '.join(report[2]) or 'none'})"
            if report
            else "not loaded"
        )
        for rank, report in enumerate(reports)
    )
    return (
        f"vllm-nway-lora differs between the processes of this engine, whose ranks would compute "
        f"LoRA differently. Engine core: {own[0]} ({settings.VARIABLE}={own[1]}); {ranks}. Install "
        f"the same version on every node, set {settings.VARIABLE} to the same value, and add nway_lora "
        "to VLLM_PLUGINS on every node that sets it."
    )


def _reporter() -> Callable[[Any], tuple[str, str, tuple[str, ...]] | None]:
    # A nested function is pickled by value, so it runs where this package is not installed.
    def report(_worker: Any) -> tuple[str, str, tuple[str, ...]] | None:
        import sys

        package = sys.modules.get("vllm_nway_lora")
        registration = sys.modules.get("vllm_nway_lora.compat.registration")
        if package is None or registration is None:
            return None
        mode = sys.modules["vllm_nway_lora.settings"].read_mode().value
        return package.__version__, mode, tuple(patch.name for patch in registration.applied())

    return report
