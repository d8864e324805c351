# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora doctor``: the state of every patch on this machine, and a self-test."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_nway_lora import __version__, settings
from vllm_nway_lora.compat import defects, groups, needs, registration, releases
from vllm_nway_lora.compat.patching import Group, Patch
from vllm_nway_lora.diagnosis import owners

#: The states of a patch: in place, not needed on this release, not applied, replaced by another package.
ON, NOT_NEEDED, ASIDE, REPLACED = "on", "not needed here", "aside", "replaced"


@dataclass(frozen=True)
class PatchState:
    """One patch, or an attribute that this package uses and that another package has replaced.

    Attributes:
        name: the patch's name; ``-`` for another attribute.
        target: the attribute.
        state: one of the states above.
        reason: the reason for that state.
        replaced_by: the module and file that had replaced the target before the patch was applied.
    """

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
        patches: every attribute of vLLM that this package replaces, and those that it uses and that
            another package has replaced.
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
    """Load all plugins and import all anchors, as the processes of an engine do together."""
    from vllm.plugins import load_general_plugins

    for load in (load_general_plugins, registration.register):
        try:
            load()
        except Exception as error:
            report.warnings.append(f"loading the plugins fails: {error}")
    # If a patch's module cannot be imported here, that error is the patch's reason.
    unimportable: dict[str, str] = {}
    for group in groups.GROUPS:
        try:
            importlib.import_module(group.anchor)
        except Exception as error:
            unimportable[group.anchor] = f"{type(error).__name__}: {error}"
    for group in groups.GROUPS:
        for patch in group.patches:
            report.patches.append(_examine(patch, group, unimportable.get(group.anchor, "")))
    report.warnings += [
        f"patch {patch.name} is not {'in place' if patch.state is REPLACED else 'applied'}: "
        f"{patch.reason}"
        for patch in report.patches
        if patch.state in (ASIDE, REPLACED)
    ]
    # Beside the patches: what this package uses, and the patches that other packages have wrapped.
    patched = {patch.target for patch in report.patches}
    others = [need for need in needs.NEEDS if str(need) not in patched]
    others += [
        patch.target
        for patch, placed in registration.placed().items()
        if placed.is_in_place and placed.current is not placed.replacement
    ]
    report.patches += [
        PatchState("-", target, REPLACED, f"by {owner}")
        for target, owner in owners.find_replaced(others).items()
    ]


def _examine(patch: Patch, group: Group, error: str) -> PatchState:
    """Return the state of a patch now.

    Args:
        patch: the patch.
        group: its group.
        error: the error of the import of the group's anchor, if any.
    """
    name, target = patch.name, str(patch.target)
    if not groups.is_needed(group, str(importlib.import_module("vllm").__version__)):
        return PatchState(name, target, NOT_NEEDED, f"this vLLM has no {', '.join(group.defects)}")
    placed = registration.placed().get(patch)
    if placed is None:
        return PatchState(name, target, ASIDE, error or registration.reason_to_stand_aside())
    before = owners.describe(placed.original)
    replaced = owners.find_replaced((patch.target,))
    if placed.is_in_place:
        replaced.pop(target, None)  # another package calls this one's
    elif not replaced:
        replaced[target] = "another package"
    if replaced:
        reason = "; ".join(f"{place} is replaced by {owner}" for place, owner in replaced.items())
        return PatchState(name, target, REPLACED, reason, before)
    return PatchState(name, target, ON, f"fixes {', '.join(group.defects)}", before)
