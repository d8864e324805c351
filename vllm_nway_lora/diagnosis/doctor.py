# SPDX-License-Identifier: Apache-2.0
"""What this package does on this machine, and why: the facts behind ``vllm-nway-lora doctor``."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_nway_lora import __version__, patches, releases, settings

#: The patch is in place; it is not needed on this release; the package stands aside.
ON, NOT_NEEDED, ASIDE = "on", "not needed here", "aside"


@dataclass(frozen=True)
class PatchState:
    """One patch: its target, its state here, and the reason for it."""

    name: str
    target: str
    state: str
    reason: str = ""
    replaced_by: str = ""


@dataclass
class Report:
    """What :func:`examine` found.

    Attributes:
        versions: distribution or module -> its version, or what stands in its place.
        warnings: what keeps the plugin from doing its job, the gravest first; empty if nothing does.
        patches: every touch on vLLM.
        defects: what stock vLLM of this release gets wrong, as users see it, with upstream's threads.
        selftest: layer and mode -> ``exact`` or what went wrong; empty where the plugin is not on.
    """

    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    patches: list[PatchState] = field(default_factory=list)
    defects: dict[str, str] = field(default_factory=dict)
    selftest: dict[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether the plugin is on and does what it should."""
        return not self.warnings and set(self.selftest.values()) == {"exact"}


def examine() -> Report:
    """Turn the plugin on in this process as a worker would, look at every patch, run the self-test."""
    report = Report(versions=_versions())
    report.warnings += _filters()
    if "not installed" in report.versions["vllm"]:
        report.warnings.append(f"vLLM: {report.versions['vllm']}")
        return report
    report.defects = {
        defect.name: " ".join([defect.user_sees, *defect.upstream])
        for defect in releases.DEFECTS
        if defect.messages(str(importlib.import_module("vllm").__version__)) is not None
    }
    if settings.read_mode() is settings.Mode.OFF:
        report.warnings.append(f"{settings.VARIABLE}=0: the plugin is off")
        return report
    _register(report)
    if not report.warnings:
        from vllm_nway_lora import selftest

        report.selftest = selftest.run()
        wrong = [label for label, verdict in report.selftest.items() if verdict != "exact"]
        if wrong:
            report.warnings.append(f"the self-test is not exact: {'; '.join(wrong)}")
    return report


def _versions() -> dict[str, str]:
    found = {"vllm-nway-lora": __version__, "python": platform.python_version()}
    for module in ("vllm", "torch", "transformers", "peft"):
        try:
            # Not a distribution's metadata: vLLM comes from several of them.
            found[module] = str(importlib.import_module(module).__version__)
        except ImportError as error:
            found[module] = f"not installed ({error})"
    if "not installed" not in found["vllm"]:
        from vllm.platforms import current_platform

        found["platform"] = type(current_platform).__name__
        support = releases.support(found["vllm"])
        found["vllm"] += f" ({support.value})"
    return found


def _filters() -> list[str]:
    """Say what keeps vLLM from loading the plugin at all."""
    found = []
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "nway_lora" not in allowed.split(","):
        found.append(
            f"VLLM_PLUGINS={allowed!r} filters the plugin out: vLLM does not load it. Add nway_lora "
            "to the list, or unset the variable"
        )
    if not list(entry_points(group="vllm.general_plugins", name="nway_lora")):
        found.append(
            "no entry point nway_lora in the group vllm.general_plugins: vLLM cannot find the plugin. "
            "Install the package (pip install vllm-nway-lora) instead of having it on the path"
        )
    try:
        installed = version("vllm-nway-lora")
    except PackageNotFoundError:
        return found
    if installed != __version__:
        found.append(f"version {installed} is installed, but {__version__} is what is imported")
    return found


def _register(report: Report) -> None:
    # A module that a patch is for and cannot be imported here is that patch's own reason.
    unimportable: dict[str, str] = {}
    for group in patches.GROUPS:
        try:
            importlib.import_module(group.anchor)
        except Exception as error:
            unimportable[group.anchor] = f"{type(error).__name__}: {error}"
    foreign = {patch: _owner(patch) for group in patches.GROUPS for patch in group.patches}
    try:
        patches.register()
    except RuntimeError as error:
        report.warnings.append(str(error))
    on = patches.applied()
    vllm_version = str(importlib.import_module("vllm").__version__)
    for group in patches.GROUPS:
        for patch in group.patches:
            target = f"{patch.module}.{patch.attribute}"
            state, reason = ON, f"mends {', '.join(group.defects)}"
            if not group.needed(vllm_version):
                state, reason = NOT_NEEDED, f"this vLLM has no {', '.join(group.defects)}"
            elif patch not in on:
                state, reason = ASIDE, unimportable.get(group.anchor, "")
                try:
                    patch.find()
                except patches.Missing as error:
                    reason = f"this vLLM lacks {error}"
                reason = reason or "its group is not whole"
                report.warnings.append(f"patch {patch.name} is not applied: {reason}")
            report.patches.append(PatchState(patch.name, target, state, reason, foreign[patch]))


def _owner(patch: patches.Patch) -> str:
    """Name the package that has replaced a target before us; empty if it is vLLM's own."""
    try:
        owner, name = patch.find()
    except patches.Missing:
        return ""
    module = str(getattr(getattr(owner, name), "__module__", "") or "")
    package = module.partition(".")[0]
    return "" if package in ("", "vllm", "vllm_nway_lora", "builtins") else module
