"""The sources of the installed vLLM: who reads the weight of a linear layer, beside its own class?

Such a reader bypasses LoRA. ``weight_readers.toml`` lists every one with the reason why an adapter is
still exact or refused, so that a new reader of a new release fails here by name.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import tomllib
import vllm

from vllm_nway_lora.compat import releases
from vllm_nway_lora.models import tables

ROOT = Path(vllm.__file__).parent
DATA = tomllib.loads(Path(__file__).with_name("weight_readers.toml").read_text())

#: Folders of vLLM whose code meets the layers of a model.
FOLDERS = ("model_executor/models", "model_executor/layers", "models", "v1/attention")
#: Code to which a layer passes itself: LoRA calls it too, and adds to its result.
OF_LAYERS = ("model_executor/layers/quantization/", "model_executor/layers/linear.py")
WEIGHTS = ("weight", "weight_packed", "qweight", "bmm_weight")
HAS_WEIGHT = rf"""\.({"|".join(WEIGHTS)})\b|["']({"|".join(WEIGHTS)})["']"""
#: What can be read of a weight that does not depend on its values.
METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "element_size", "stride", "nbytes"}
    | {"is_cuda", "is_cpu", "is_meta", "is_contiguous", "weight_loader", "output_dim", "input_dim"}
)
#: vLLM wraps only subclasses of these for LoRA, never `torch.nn.Linear`.
LINEAR = frozenset(
    {"LinearBase", "ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear"}
    | {"MergedColumnParallelLinear", "QKVParallelLinear", "GateLinear"}
)
#: Layers of these names are refused in any class.
REFUSED_ANYWHERE = frozenset(layer for owner, layer in tables.UNSUPPORTED if not owner)


def called(node: ast.AST) -> set[str]:
    """Return the names of what an expression calls, in each branch of a conditional one."""
    if isinstance(node, ast.IfExp):
        return called(node.body) | called(node.orelse)
    if not isinstance(node, ast.Call):
        return set()
    return {getattr(node.func, "attr", getattr(node.func, "id", "?"))}


def list_assigned(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the attributes of objects that a scope assigns, and what it assigns to them."""
    for node in ast.walk(scope):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((t.attr, node.value) for t in targets if isinstance(t, ast.Attribute))


@functools.cache
def parse() -> dict[str, ast.Module]:
    found = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        # Parsing a file of kernels takes long.
        if not name.startswith(OF_LAYERS) and re.search(rf"Linear|{HAS_WEIGHT}", text):
            found[name] = ast.parse(text)
    return found


@functools.cache
def linear_classes() -> frozenset[str]:
    """Return the names of the linear layers' classes, with every subclass in the sources."""
    bases: dict[str, set[str]] = {}
    for tree in parse().values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
                bases.setdefault(node.name, set()).update(names)
    known = set(LINEAR)
    while found := {name for name, of in bases.items() if of & known} - known:
        known |= found
    return frozenset(known)


def may_be_linear(value: ast.expr) -> bool:
    """Return False for an instance of a class that is known not to be a linear layer."""
    names = called(value)
    return not names or any(
        name in linear_classes() or name == "?" or not name[:1].isupper() for name in names
    )


@functools.cache
def linear_names() -> frozenset[str]:
    """Return the names of all attributes that hold a linear layer somewhere."""
    return frozenset(
        name
        for tree in parse().values()
        for name, value in list_assigned(tree)
        if called(value) & linear_classes()
        or any(c.lower().endswith(("linear_cls", "linear_class")) for c in called(value))
    )


def find_readers() -> set[str]:
    """Return ``file: Class.layer`` of every read; a function's name stands for a missing class."""
    return {
        f"{file}: {scope.name}.{layer}"
        for file, tree in parse().items()
        if re.search(HAS_WEIGHT, (ROOT / file).read_text())
        for scope in tree.body
        if isinstance(scope, (ast.ClassDef, ast.FunctionDef))
        for layer in find_layers(scope)
    }


def find_layers(scope: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Yield the names of the layers whose weights a class or a function reads."""
    own: dict[str, list[bool]] = {}
    for name, value in list_assigned(scope):
        own.setdefault(name, []).append(may_be_linear(value))
    is_method = scope.name.endswith(("Method", "Kernel", "LowLatencyApply"))
    functions = scope.body if isinstance(scope, ast.ClassDef) else [scope]
    for function in functions:
        # A loader reads the parameters to fill them.
        if not isinstance(function, ast.FunctionDef) or "load_weight" in function.name:
            continue
        aliases = {
            target.id: node.value.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for target in find_reads(function):
            layer = getattr(target, "attr", getattr(target, "id", ""))
            if isinstance(target, ast.Attribute):
                is_own = isinstance(target.value, ast.Name) and target.value.id == "self"
                if is_own and not any(own.get(layer, [True])):
                    continue
            elif is_method and layer == "layer":
                continue  # the layer passes itself to its method
            else:
                layer = aliases.get(layer, layer)
            if layer in linear_names() - REFUSED_ANYWHERE:
                yield layer


def find_reads(function: ast.AST) -> Iterator[ast.expr]:
    """Yield what a function reads a weight of."""
    parents: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(function):
        parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
    for node in parents:
        target: ast.expr
        if isinstance(node, ast.Attribute) and node.attr in WEIGHTS:
            target = node.value
        elif (
            isinstance(node, ast.Call)
            and called(node) == {"getattr"}
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value in WEIGHTS
        ):
            target = node.args[0]
        else:
            continue
        outer = parents[node]
        if isinstance(outer, ast.Attribute) and outer.attr == "data":
            outer = parents[outer]
        if not (isinstance(outer, ast.Attribute) and outer.attr in METADATA):
            yield target


def patterns() -> Iterator[str]:
    for group in DATA["group"]:
        yield from (*group["readers"], *group.get("older", ()))


def test_every_reader_of_a_weight_is_known() -> None:
    unknown = {r for r in find_readers() if not any(fnmatchcase(r, p) for p in patterns())}
    unknown = {r for r in unknown if not r.startswith(tuple(DATA["without_lora"]["folders"]))}
    assert not unknown, "a product past its LoRA? Refuse it, turn it off, or list it with a reason"


@pytest.mark.skipif(
    releases.parse(vllm.__version__) != releases.LAST, reason="older releases lack some of them"
)
def test_every_entry_is_found_in_the_newest_release() -> None:
    found = find_readers()
    unused = {
        pattern
        for group in DATA["group"]
        for pattern in group["readers"]
        if not any(fnmatchcase(reader, pattern) for reader in found)
    }
    assert not unused


def test_folders_without_lora_have_none() -> None:
    for file, tree in parse().items():
        if file.startswith(tuple(DATA["without_lora"]["folders"])):
            names = {
                getattr(base, "id", "")
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for base in node.bases
            }
            assert "SupportsLoRA" not in names, file


def test_a_new_reader_is_found() -> None:
    source = """
class Block(nn.Module):
    def __init__(self):
        self.proj = RowParallelLinear(8, 8)
        self.norm = RMSNorm(8)
    def forward(self, x):
        gate = self.mlp.gate
        x = x.to(self.proj.weight.dtype) * self.norm.weight
        return kernel(x, self.proj.weight, gate.weight)
"""
    [scope] = ast.parse(source).body
    assert isinstance(scope, ast.ClassDef)
    assert sorted(find_layers(scope)) == ["gate", "proj"]
