# SPDX-License-Identifier: Apache-2.0
"""Compare the plugin's version, setting and patches between the processes of an engine. Engine core."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from vllm_nway_lora import __version__, settings
from vllm_nway_lora.compat import groups

Report = tuple[str, str, tuple[str, ...]] | None


class RankError(RuntimeError):
    """The ranks of one engine do not run the same plugin."""


def initialize_kv_caches(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
    """Compare the ranks, then go on; wraps ``EngineCore._initialize_kv_caches``.

    ``EngineCore.__init__`` calls it after it has created the workers. That constructor itself cannot
    be wrapped: in a spawned engine core it loads the plugin, so it is running already.

    Raises:
        RankError: LoRA is on, and a worker lacks the plugin, or has another version, setting or set
            of patches.
    """
    if engine.vllm_config.lora_config is not None:
        reports = engine.model_executor.collective_rpc(_reporter())
        message = compare_ranks(reports, _expected_patches())
        if message:
            engine.model_executor.shutdown()
            raise RankError(message)
    return wrapped(*args, **kwargs)


def compare_ranks(reports: Sequence[Report], expected: Sequence[str]) -> str:
    """Return how the ranks' reports (see :func:`_reporter`) differ; empty if they agree.

    Args:
        reports: per rank ``(plugin version, VLLM_NWAY_LORA, names of its patches)``, or None where
            the plugin was not loaded.
        expected: names of the patches that every worker of this release has.
    """
    own = (__version__, settings.read_mode().value)
    if all(report and report[:2] == own and set(expected) <= {*report[2]} for report in reports):
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
        f"LoRA differently. Engine core: {own[0]} ({settings.VARIABLE}={own[1]}; patches of a worker: "
        f"{', '.join(expected)}); {ranks}. Install the same version on every node, set "
        f"{settings.VARIABLE} to the same value, and add nway_lora to VLLM_PLUGINS on every node that "
        "sets it."
    )


def _expected_patches() -> list[str]:
    """Return the names of the patches that every worker with LoRA has on this release.

    A group that can be turned off alone is left out: a rank may lack it.
    """
    version = importlib.import_module("vllm").__version__
    return [
        patch.name
        for group in groups.GROUPS
        if group.anchor == "vllm.lora.worker_manager"
        and not group.switch
        and groups.is_needed(group, version)
        for patch in group.patches
    ]


def _reporter() -> Callable[[Any], Report]:
    # A nested function is pickled by value, so it runs where this package is not installed.
    def report(_worker: Any) -> tuple[str, str, tuple[str, ...]] | None:
        import sys

        package = sys.modules.get("vllm_nway_lora")
        registration = sys.modules.get("vllm_nway_lora.compat.registration")
        if package is None or registration is None:
            return None
        mode = sys.modules["vllm_nway_lora.settings"].read_mode().value
        # Not `applied`: a package that has replaced a target on every rank is no difference.
        return package.__version__, mode, tuple(patch.name for patch in registration.placed())

    return report
