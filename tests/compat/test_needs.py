"""The needs: everything of vLLM that the package uses is one, and the installed release has them all."""

from __future__ import annotations

import ast
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vllm

import vllm_nway_lora
from vllm_nway_lora.compat import groups, needs, registration, releases
from vllm_nway_lora.compat.patching import Need
from vllm_nway_lora.compat.sources import Sources

PACKAGE = Path(vllm_nway_lora.__file__).parent
#: The subpackages that run in an engine. `diagnosis` and the command run by hand: if vLLM lacks what they
#: use, they fail, and the plugin need not stand aside. `compat` names what it touches in its needs.
SUBPACKAGES = ("adapters", "engine", "layers", "models", "rows")
#: Modules of vLLM whose objects the package meets, beside those that a need names.
VLLM_MODULES = (
    "vllm.lora.layers.vocab_parallel_embedding",
    "vllm.lora.punica_wrapper.punica_base",
    "vllm.model_executor.layers.fused_moe.modular_kernel",
    "vllm.v1.engine.core_client",
    "vllm.v1.worker.worker_base",
)

#: Names that vLLM's classes have too and that need no entry -> the reason.
EXCEPTIONS = {
    "architectures": "of a model's configuration, read with a default",
    "cache": "functools.cache",
    "capacity": "of `Residency`",
    "config": "of a model, read with a default",
    "decode": "of `rows.codes`",
    "experts": "of `Mixture`",
    "get_mm_mapping": "of a multimodal model; this package sets it where a class lacks it",
    "is_3d_moe_weight": "of a model's class, read with a default",
    "kwargs": "of `Call`",
    "layers": "of the kinds of mixers",
    "load_weights": "every model class has it",
    "module": "of `Slice`",
    "moe_config": "of a layer of experts, whose class differs between releases",
    "path": "of `Source`",
    "popleft": "of `collections.deque`",
    "prepare": "of the files of single models",
    "ready": "of `Residency`",
    "run": "of `Slice`",
    "start": "of `slice`",
    "stat": "os.DirEntry.stat",
    "status": "of `Reply`",
    "validate": "of `FusionPlan`",
    "weight": "read with a default: a quantised layer has none",
}
#: Imports of the package that may fail -> what happens then.
OPTIONAL_IMPORTS = {
    "vllm.lora.layers.custom_layer": "`step5.layer_classes` returns none",
    "vllm.lora.punica_wrapper.punica_cpu": "imported only where vLLM hands out that class",
}

ALL_NEEDS = (
    *needs.NEEDS,
    *needs.RECENT,
    *needs.OF_OPTIONAL_OWNERS,
    *needs.RECENT_OF_OPTIONAL_OWNERS,
    *(need for group in groups.GROUPS for need in group.needs),
    *(patch.target for group in groups.GROUPS for patch in group.patches),
)


@functools.cache
def sources() -> Sources:
    return Sources()


@functools.cache
def vllm_names() -> frozenset[str]:
    """Return the functions and classes of vLLM's modules, and the attributes of these classes."""
    names: set[str] = set()
    for module in {*VLLM_MODULES, *(need.module for need in ALL_NEEDS)}:
        for name in sources().list_names(module):
            names |= {name, *sources().find_members(module, name)}
    return frozenset(names)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    files = [
        file for subpackage in SUBPACKAGES for file in sorted((PACKAGE / subpackage).glob("*.py"))
    ]
    for path in (*files, PACKAGE / "settings.py"):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def used_names() -> Iterator[tuple[str, str]]:
    """Yield ``(name, place)`` of every attribute, also those named in ``getattr`` and the like, and of
    every keyword argument of a function of vLLM.
    """
    for path, tree in trees():
        from_vllm = {name for _, name in imported_names(tree)}
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                yield node.attr, place
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    yield name.value, place
            if node.func.id in from_vllm:
                yield from ((keyword.arg or "", place) for keyword in node.keywords)


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield ``(module, name)`` of every import of a name from vLLM."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            yield from ((node.module or "", alias.name) for alias in node.names)


def others_names() -> set[str]:
    """Return the attributes of torch and of Python's own classes, which need no entry."""
    owners = (
        torch,
        torch.finfo,
        torch.library.Library,
        torch.Tensor,
        torch.nn,
        torch.nn.functional,
        torch.nn.Module,
    )
    builtin = (str, list, dict, set, tuple, int, Exception, logging.Logger)
    return {name for owner in (*owners, *builtin) for name in dir(owner)}


def test_used_attributes_are_found_in_every_form() -> None:
    """Read, named in a call of ``getattr``, and an argument."""
    used = {name for name, _ in used_names()}
    assert {"token_lora_indices", "_restrict_to_local_experts", "orig_to_new_substr"} <= used
    assert {"token_lora_indices", "orig_to_new_substr", "from_layer", "running"} <= vllm_names()


def test_every_used_attribute_is_a_need() -> None:
    known = {need.attribute.rpartition(".")[2] for need in ALL_NEEDS}
    known |= {need.attribute.partition(".")[0] for need in ALL_NEEDS}
    known |= {name for need in ALL_NEEDS for name in need.parameters}
    known |= {*EXCEPTIONS, *others_names()}
    missing = {f"{name} ({place})" for name, place in used_names() if name in vllm_names() - known}
    assert not missing, "add these to compat/needs.py, or to EXCEPTIONS with a reason"


def test_every_import_is_a_need() -> None:
    known = {f"{need.module}.{need.attribute.partition('.')[0]}" for need in ALL_NEEDS}
    modules = {need.module for need in ALL_NEEDS}
    missing = {
        f"{module}.{name} ({path})"
        for path, tree in trees()
        for module, name in imported_names(tree)
        if f"{module}.{name}" not in {*known, *modules} and module not in OPTIONAL_IMPORTS
    }
    assert not missing, "add these to compat/needs.py"


def test_exceptions_are_used() -> None:
    assert set(EXCEPTIONS) <= {name for name, _ in used_names()}
    if is_newest():  # an older release does not know all of them
        assert set(EXCEPTIONS) <= vllm_names()
    assert set(EXCEPTIONS).isdisjoint(others_names())
    imported = {module for _, tree in trees() for module, _ in imported_names(tree)}
    assert set(OPTIONAL_IMPORTS) <= imported


def test_installed_release_has_every_need() -> None:
    assert registration.find_missing(vllm.__version__) == ()


def is_newest() -> bool:
    return releases.parse(vllm.__version__) == releases.LAST


@pytest.mark.skipif(not is_newest(), reason="older releases lack some of them")
def test_newest_release_has_the_recent_attributes_and_the_optional_owners() -> None:
    optional = (*needs.OF_OPTIONAL_OWNERS, *needs.RECENT_OF_OPTIONAL_OWNERS)
    for need in (*needs.RECENT, *optional):
        assert not sources().find_fault(need)


def test_only_releases_after_the_newest_need_the_recent_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = Need("vllm.lora.utils", "lost")
    monkeypatch.setattr(needs, "RECENT", (lost,))
    for version, missing in (("998", (str(lost),)), ("dev998", (str(lost),)), ("0.32.998", ())):
        found = registration.find_missing(version)
        assert tuple(name for name in found if name == str(lost)) == missing, version
