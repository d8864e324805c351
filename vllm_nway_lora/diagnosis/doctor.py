# SPDX-License-Identifier: Apache-2.0
"""``vllm-nway-lora doctor``: the state of every patch on this machine, and a self-test."""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_nway_lora import __version__, settings
from vllm_nway_lora.compat import defects, groups, needs, registration, releases
from vllm_nway_lora.compat.patching import Group, Need, Patch
from vllm_nway_lora.diagnosis import issue, owners, tables_here

#: The states of a patch: in place, not needed on this release, not applied; another package's function
#: stands in its place, or around it and can call it.
ON, NOT_NEEDED, ASIDE, REPLACED, WRAPPED = "on", "not needed here", "aside", "replaced", "wrapped"
#: The state of a patch whose group its variable turns off.
SWITCHED_OFF = "switched off"
#: The beginning of a version that cannot be read.
_ABSENT = "not installed"
#: vLLM's table of LoRA layer classes (vllm/lora/utils.py).
_TABLE = "_all_lora_classes"
#: The state of a class that another package has added to vLLM's LoRA layer classes.
ADDED = "added"


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
        environment: the variables that turn the plugin on or off -> their values.
        warnings: what keeps the plugin from working, the most severe first; empty if it works.
        patches: every attribute of vLLM that this package replaces, and those that it uses and that
            another package has replaced.
        defects: defect of this release of vLLM -> its description and upstream's threads.
        by_table: class or projection of this release -> what this package knows of it by a table.
        switched_on: the architectures of this release that take LoRA with this package only.
        agreement: what the ranks of an engine compare, and this process's part in it.
        selftest: layer and mode -> ``exact`` or the fault; empty if the plugin is not on.
        issue: the text to paste into an issue.
    """

    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    patches: list[PatchState] = field(default_factory=list)
    defects: dict[str, str] = field(default_factory=dict)
    by_table: dict[str, str] = field(default_factory=dict)
    switched_on: list[str] = field(default_factory=list)
    agreement: dict[str, str] = field(default_factory=dict)
    selftest: dict[str, str] = field(default_factory=dict)
    issue: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the plugin is on and exact."""
        return not self.warnings and set(self.selftest.values()) == {"exact"}

    @property
    def has_vllm(self) -> bool:
        """Whether vLLM can be imported."""
        return _ABSENT not in self.versions["vllm"]


def examine() -> Report:
    """Turn the plugin on in this process as a worker does, check every patch, run the self-test."""
    report = Report(versions=_list_versions(), environment=_list_variables())
    if report.has_vllm:
        _examine_vllm(report)
    else:
        report.warnings.append(f"vLLM is {report.versions['vllm']}. Python is {sys.executable}")
    report.issue = issue.write_text(report)
    return report


def _examine_vllm(report: Report) -> None:
    vllm: Any = importlib.import_module("vllm")
    report.warnings += _filters()
    report.defects = {
        defect.name: " ".join([defect.user_sees, *defect.upstream])
        for defect in defects.DEFECTS
        if defect.affects(str(vllm.__version__))
    }
    report.by_table = tables_here.list_tables(Path(vllm.__file__).parent)
    try:
        mode = settings.read_mode()
        settings.is_on(settings.CPU_VARIABLE)
    except ValueError as error:
        report.warnings.append(str(error))
        return
    if mode is settings.Mode.OFF:
        report.warnings.append(f"{settings.VARIABLE}=0: the plugin is off")
        return
    _register(report)
    report.switched_on = tables_here.list_switched_on()
    report.agreement = explain_agreement()
    if not report.warnings:
        from vllm_nway_lora.diagnosis import selftest

        report.selftest = selftest.run()
        wrong = [label for label, result in report.selftest.items() if result != "exact"]
        if wrong:
            report.warnings.append(f"the self-test is not exact: {'; '.join(wrong)}")


def explain_agreement() -> dict[str, str]:
    """Return what the ranks of an engine compare, this process's part, and what a difference does."""
    names = [patch.name for patch in registration.placed()]
    return {
        "compared": f"version, {settings.VARIABLE} and patches of every worker, by the engine core of an "
        "engine with LoRA, before it serves",
        "this process": f"{__version__}, {settings.VARIABLE}={settings.read_mode().value}, patches: "
        f"{', '.join(names) or 'none'}",
        "if they differ": "the engine does not start. Its error, RankError, names each rank's version, "
        "setting and patches",
    }


def _list_versions() -> dict[str, str]:
    found = {
        "vllm-nway-lora": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for module in ("vllm", "torch", "transformers", "peft"):
        try:
            # Not from a distribution's metadata: several distributions contain vLLM.
            found[module] = str(importlib.import_module(module).__version__)
        except ModuleNotFoundError as error:
            found[module] = f"{_ABSENT} ({error})"
        except Exception as error:  # a library that does not load, for example
            found[module] = f"{_ABSENT} so that it works ({type(error).__name__}: {error})"
    if _ABSENT not in found["vllm"]:
        from vllm.platforms import current_platform

        found["platform"] = type(current_platform).__name__
        support = releases.support(found["vllm"])
        found["vllm"] += f" ({support.value})"
    return found


def _list_variables() -> dict[str, str]:
    names = (settings.VARIABLE, settings.CPU_VARIABLE, "VLLM_PLUGINS")
    return {name: os.environ.get(name, "unset") for name in names}


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
    if aside := registration.reason_to_stand_aside():
        report.warnings.append(f"the plugin stands aside and leaves vLLM unchanged: {aside}")
    report.warnings += [
        f"patch {patch.name} is not {'in place' if patch.state is REPLACED else 'applied'}: "
        f"{patch.reason}"
        for patch in report.patches
        if patch.state is REPLACED or (patch.state is ASIDE and patch.reason != aside)
    ]
    report.patches += _examine_others({patch.target for patch in report.patches})


def _examine(patch: Patch, group: Group, error: str) -> PatchState:
    """Return the state of a patch now.

    Args:
        patch: the patch.
        group: its group.
        error: the error of the import of the group's anchor, if any.
    """
    name, target = patch.name, str(patch.target)
    if not groups.is_switched_on(group):
        return PatchState(name, target, SWITCHED_OFF, f"{group.switch}=0")
    if not groups.is_needed(group, str(importlib.import_module("vllm").__version__)):
        return PatchState(name, target, NOT_NEEDED, f"this vLLM has no {', '.join(group.defects)}")
    placed = registration.placed().get(patch)
    if placed is None:
        return PatchState(name, target, ASIDE, error or registration.reason_to_stand_aside())
    before = owners.describe(placed.original)
    is_class = inspect.isclass(placed.owner)
    classes = {target.rpartition(".")[0]: placed.owner} if is_class else {}
    found = owners.find_replaced((patch.target,), classes)
    if placed.current is placed.replacement:
        found.pop(target, None)
    else:
        found.setdefault(target, placed.current)
    replaced, wrapped = [], []
    for place, attribute in found.items():
        owner = owners.describe(attribute) or "another package"
        if inspect.isclass(attribute):
            if not (is_class and issubclass(attribute, placed.owner)):
                replaced.append(f"{place} is replaced by {owner}")
        elif owners.calls_on(attribute, placed.name, placed.replacement):
            wrapped.append(f"{place} is wrapped by {owner}")
        else:
            replaced.append(f"{place} is replaced by {owner}")
    if replaced:
        return PatchState(name, target, REPLACED, "; ".join(replaced), before)
    if wrapped:
        return PatchState(name, target, WRAPPED, "; ".join(wrapped), before)
    return PatchState(name, target, ON, f"fixes {', '.join(group.defects)}", before)


def _examine_others(patched: set[str]) -> list[PatchState]:
    """Return what other packages have replaced of the rest that this package uses, and have added.

    Args:
        patched: the targets of the patches.
    """
    used: list[Need] = [need for group in groups.GROUPS for need in group.needs]
    used += needs.NEEDS
    found = owners.find_replaced(need for need in used if str(need) not in patched)
    states = [
        PatchState("-", place, REPLACED, f"by {owners.describe(attribute)}")
        for place, attribute in found.items()
    ]
    utils = sys.modules.get("vllm.lora.utils")
    states += [
        PatchState("-", f"vllm.lora.utils.{_TABLE}", ADDED, f"{layer.__name__} by {owner}")
        for layer in getattr(utils, _TABLE, ())
        if (owner := owners.describe(layer))
    ]
    return states
