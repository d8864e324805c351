# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora doctor``: the state of every patch on this machine, and a self-test."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_nway_lora import __version__, settings
from vllm_nway_lora.compat import defects, groups, registration, releases
from vllm_nway_lora.compat.patching import MissingAttributeError, Patch

#: The states of a patch: in place, not needed on this release, not applied.
ON, NOT_NEEDED, ASIDE = "on", "not needed here", "aside"


@dataclass(frozen=True)
class PatchState:
    """One patch, its target, its state and the reason for that state."""

    name: str
    target: str
    state: str
    reason: str = ""
    replaced_by: str = ""


@dataclass
class Report:
    """The result of :func:`examine`.

    Attributes:
        versions: distribution or module -> its version, or the error of its import.
        warnings: what keeps the plugin from working, the most severe first; empty if it works.
        patches: every attribute of vLLM that this package replaces.
        defects: defect of this release of vLLM -> its description and upstream's threads.
        selftest: layer and mode -> ``exact`` or the fault; empty if the plugin is not on.
    """

    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    patches: list[PatchState] = field(default_factory=list)
    defects: dict[str, str] = field(default_factory=dict)
    selftest: dict[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether the plugin is on and exact."""
        return not self.warnings and set(self.selftest.values()) == {"exact"}


def examine() -> Report:
    """Turn the plugin on in this process as a worker does, check every patch, run the self-test."""
    report = Report(versions=_versions())
    report.warnings += _filters()
    if "not installed" in report.versions["vllm"]:
        report.warnings.append(f"vLLM: {report.versions['vllm']}")
        return report
    report.defects = {
        defect.name: " ".join([defect.user_sees, *defect.upstream])
        for defect in defects.DEFECTS
        if defect.affects(str(importlib.import_module("vllm").__version__))
    }
    if settings.read_mode() is settings.Mode.OFF:
        report.warnings.append(f"{settings.VARIABLE}=0: the plugin is off")
        return report
    _register(report)
    if not report.warnings:
        from vllm_nway_lora.diagnosis import selftest

        report.selftest = selftest.run()
        wrong = [label for label, result in report.selftest.items() if result != "exact"]
        if wrong:
            report.warnings.append(f"the self-test is not exact: {'; '.join(wrong)}")
    return report


def _versions() -> dict[str, str]:
    found = {"vllm-nway-lora": __version__, "python": platform.python_version()}
    for module in ("vllm", "torch", "transformers", "peft"):
        try:
            # Not from a distribution's metadata: several distributions contain vLLM.
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
    """Return what keeps vLLM from loading the plugin."""
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
            "Install the package with pip; being importable is not enough"
        )
    try:
        installed = version("vllm-nway-lora")
    except PackageNotFoundError:
        return found
    if installed != __version__:
        found.append(f"version {installed} is installed, but version {__version__} is imported")
    return found


def _register(report: Report) -> None:
    # If a patch's module cannot be imported here, that error is the patch's reason.
    unimportable: dict[str, str] = {}
    for group in groups.GROUPS:
        try:
            importlib.import_module(group.anchor)
        except Exception as error:
            unimportable[group.anchor] = f"{type(error).__name__}: {error}"
    foreign = {patch: _owner(patch) for group in groups.GROUPS for patch in group.patches}
    try:
        registration.register()
    except RuntimeError as error:
        report.warnings.append(str(error))
    on = registration.applied()
    vllm_version = str(importlib.import_module("vllm").__version__)
    for group in groups.GROUPS:
        for patch in group.patches:
            state, reason = ON, f"fixes {', '.join(group.defects)}"
            if not groups.is_needed(group, vllm_version):
                state, reason = NOT_NEEDED, f"this vLLM has no {', '.join(group.defects)}"
            elif patch not in on:
                state, reason = ASIDE, unimportable.get(group.anchor, "")
                try:
                    patch.find()
                except MissingAttributeError as error:
                    reason = f"this vLLM lacks {error}"
                reason = reason or "another part of its group is missing"
                report.warnings.append(f"patch {patch.name} is not applied: {reason}")
            report.patches.append(
                PatchState(patch.name, str(patch.target), state, reason, foreign[patch])
            )


def _owner(patch: Patch) -> str:
    """Return the module that replaced a target before this package; empty if it is vLLM's own."""
    try:
        owner, name = patch.find()
    except MissingAttributeError:
        return ""
    module = str(getattr(getattr(owner, name), "__module__", "") or "")
    package = module.partition(".")[0]
    return "" if package in ("", "vllm", "vllm_nway_lora", "builtins") else module
