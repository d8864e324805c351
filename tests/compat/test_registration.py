"""The plugin's effect on a process: none when off, a few patches on import when on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import vllm
from support.processes import evaluate, run_python

import vllm_nway_lora
from vllm_nway_lora.compat import groups, registration

#: The patches that the installed release needs.
PATCHES = tuple(
    patch
    for group in groups.GROUPS
    if groups.is_needed(group, vllm.__version__)
    for patch in group.patches
)

# Prints three things: a description, without addresses, of every attribute of every vLLM module that
# the anchors import and of every class there; the variable's part of the key of vLLM's compile
# cache; vLLM's complaint about its environment.
SNAPSHOT = """
import importlib, json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
for anchor in ANCHORS:
    importlib.import_module(anchor)
from vllm import envs
from vllm.platforms import current_platform
# vLLM checks its environment in the platform from 0.32.0 on, in `envs` before.
check = getattr(current_platform, "validate_environ", None) or envs.validate_environ

def describe(value, depth=2):
    if isinstance(value, (tuple, list)) and depth:
        return [describe(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)) and depth:  # its order differs between processes
        return sorted(json.dumps(describe(item, depth - 1)) for item in value)
    if isinstance(value, property):
        value = value.fget
    kind = type(value).__name__
    if kind in ("function", "type", "FunctionWrapper", "builtin_function_or_method", "module"):
        return f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return kind

attributes = {}
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] != "vllm":
        continue
    for attribute, value in list(vars(module).items()):
        if not attribute.startswith("__"):
            attributes[f"{name}.{attribute}"] = describe(value)
        if isinstance(value, type) and value.__module__ == name:
            for member, found in list(vars(value).items()):
                if not member.startswith("_abc"):
                    attributes[f"{name}.{attribute}.{member}"] = describe(found)
try:
    check(True)
    complaint = ""
except ValueError as error:
    complaint = str(error)
print(json.dumps([attributes, envs.compile_factors().get("VLLM_NWAY_LORA"), complaint]))
"""


@pytest.fixture(scope="module")
def snapshots() -> dict[str, tuple[dict[str, Any], str | None, str]]:
    """Snapshots of vLLM without the plugin (filtered out by name), with it off and with it on."""
    environments: dict[str, dict[str, str]] = {
        "without": {"VLLM_NWAY_LORA": "0", "VLLM_PLUGINS": "lora_filesystem_resolver"},
        "off": {"VLLM_NWAY_LORA": "0", "VLLM_PLUGINS": "lora_filesystem_resolver,nway_lora"},
        "on": {"VLLM_NWAY_LORA": "1", "VLLM_PLUGINS": "lora_filesystem_resolver,nway_lora"},
    }
    code = f"ANCHORS = {[group.anchor for group in groups.GROUPS]}\n{SNAPSHOT}"
    return {name: evaluate(code, **values) for name, values in environments.items()}


def test_off_leaves_vllm_unchanged(snapshots: dict[str, Any]) -> None:
    without, off, on = (snapshots[name][0] for name in ("without", "off", "on"))
    assert off == without
    # The same comparison finds exactly the patches of a process with the plugin on.
    changed = {name for name in {*without, *on} if on.get(name) != without.get(name)}
    assert changed == {str(patch.target) for patch in PATCHES}


def test_vllm_knows_the_variable(snapshots: dict[str, Any]) -> None:
    assert "VLLM_NWAY_LORA" in snapshots["without"][2]
    assert snapshots["off"][2] == snapshots["on"][2] == ""


def test_compile_cache_key_depends_on_plugin(snapshots: dict[str, Any]) -> None:
    without, off, on = (snapshots[name][1] for name in ("without", "off", "on"))
    assert without is None
    assert off != on
    assert vllm_nway_lora.__version__ in on


def test_entry_point_is_register() -> None:
    [entry_point] = entry_points(group="vllm.general_plugins", name="nway_lora")
    assert entry_point.load() is vllm_nway_lora.register


def test_register_alone_imports_neither_torch_nor_vllm() -> None:
    imported = evaluate(
        """
        import json, sys
        import vllm_nway_lora
        vllm_nway_lora.register()
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
        """
    )
    assert "vllm_nway_lora" in imported
    assert not {"torch", "vllm", "transformers"} & set(imported)


def test_register_in_a_vllm_process_imports_nothing_of_vllm() -> None:
    added = evaluate(
        """
        import json, sys
        import vllm.plugins, vllm.envs, vllm_nway_lora
        before = set(sys.modules)
        vllm_nway_lora.register()
        print(json.dumps(sorted(set(sys.modules) - before)))
        """
    )
    assert "vllm_nway_lora.compat.groups" in added
    assert not [name for name in added if name.startswith(("vllm.", "torch"))]


@pytest.mark.parametrize("value", ["2", "true", "on", "strict!"])
def test_invalid_value_raises_error_that_lists_valid_values(value: str) -> None:
    done = run_python("import vllm_nway_lora; vllm_nway_lora.register()", VLLM_NWAY_LORA=value)
    assert done.returncode != 0
    for text in (f"VLLM_NWAY_LORA='{value}'", "1 (on", "0 (off", "strict (refuse"):
        assert text in done.stderr


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return vLLM's module with ``from_layer``, all anchors imported and the plugin off."""
    import vllm.lora.utils

    for group in groups.GROUPS:
        importlib.import_module(group.anchor)
    vllm_nway_lora.unregister()
    monkeypatch.delenv("VLLM_NWAY_LORA", raising=False)
    yield vllm.lora.utils
    vllm_nway_lora.unregister()


def test_register_and_unregister_can_be_repeated(utils: ModuleType) -> None:
    stock, table = utils.from_layer, utils._all_lora_classes
    for _ in range(2):
        vllm_nway_lora.register()
        ours = utils.from_layer
        vllm_nway_lora.register()
        assert utils.from_layer is ours
        assert ours is not stock
        assert utils._all_lora_classes is table
        vllm_nway_lora.unregister()
        vllm_nway_lora.unregister()
        assert utils.from_layer is stock
        assert not registration.applied()


@pytest.mark.parametrize(
    ("value", "on"), [("", True), ("1", True), ("strict", True), ("lenient", True), ("0", False)]
)
def test_valid_values(
    utils: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, on: bool
) -> None:
    monkeypatch.setenv("VLLM_NWAY_LORA", value)
    vllm_nway_lora.register()
    assert set(registration.applied()) == set(PATCHES if on else ())
