# SPDX-License-Identifier: Apache-2.0
"""Find who else holds a layer that has LoRA: it would use the weight without the adapter.

The search covers the model's modules and what hangs on their plain attributes, because a reader need
not be a module: an attention's implementation keeps ``kv_b_proj`` of the MLA models in an attribute.
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_nway_lora.rows.notes import get_notes

#: The number of plain attributes and containers between a module and a layer that is found.
_DEPTH = 6
#: The number of items of a container that are read.
_ITEMS = 4096

_LEAVES = (torch.Tensor, type, types.ModuleType, str, bytes, int, float, complex, type(None))
#: Packages and modules whose objects, if they are no modules, hold no layer of the model, or all of
#: them: the search would end in the whole process.
_FOREIGN = frozenset({*sys.stdlib_module_names, "numpy", "torch", "transformers", "triton"})
_SKIPPED = ("vllm.config", "vllm.distributed", "vllm.lora", "vllm.platforms")
_CONTAINERS = (list, tuple, set, frozenset, deque)
#: Attributes of ``nn.Module`` itself; the modules in ``_modules`` are read on their own.
_OF_MODULES = frozenset(vars(nn.Module()))


class Reader(NamedTuple):
    """An object that holds a base layer past its LoRA layer.

    Attributes:
        holder: the object, without the containers in between.
        attribute: the holder's attribute that leads to the layer.
        layer: the base layer.
        is_child: whether the holder is a module, and the layer its child of that name.
    """

    holder: Any
    attribute: str
    layer: Any
    is_child: bool


def find_readers(model: nn.Module, skipped: Iterable[Any] = ()) -> list[Reader]:
    """Return who holds the base layers of linear LoRA layers, beside these LoRA layers.

    Never raises, reads no property, and visits each object once.

    Args:
        model: the model, its LoRA layers in place.
        skipped: objects that are not searched, such as the LoRA manager.
    """
    bases = {
        id(module.base_layer)
        for module in model.modules()
        if isinstance(module, BaseLinearLayerWithLoRA)
    }
    seen = {id(item) for item in skipped}
    kept: list[Any] = []
    modules, readers = _list_modules(model, bases, seen)
    queue: deque[tuple[Any, Any, str, int]] = deque((m, m, "", 0) for m in modules)
    while queue:
        holder, owner, attribute, depth = queue.popleft()
        try:
            parts = list(_list_parts(holder))
        except Exception:  # a container of another package
            continue
        for name, part in parts:
            place = attribute or name
            if id(part) in bases:
                readers.append(Reader(owner, place, part, is_child=False))
            elif depth == _DEPTH or id(part) in seen or not _is_searched(part):
                continue
            elif issubclass(type(part), nn.Module):
                found, parents = _list_modules(part, bases, seen)
                queue.extend((module, module, "", depth + 1) for module in found)
                readers += parents
            else:
                seen.add(id(part))
                kept.append(part)  # else another object could get its id
                is_owner = not _is_container(part)
                queue.append((part, *((part, "") if is_owner else (owner, place)), depth + 1))
    return readers


def _list_modules(
    root: nn.Module, bases: set[int], seen: set[int]
) -> tuple[list[nn.Module], list[Reader]]:
    """Return the modules outside of linear LoRA layers, and those with a base layer as a child."""
    found: list[nn.Module] = []
    readers: list[Reader] = []
    stack = [root]
    while stack:
        module = stack.pop()
        if id(module) in seen or isinstance(module, BaseLinearLayerWithLoRA):
            continue
        seen.add(id(module))
        found.append(module)
        for name, child in module._modules.items():
            if id(child) in bases:
                readers.append(Reader(module, name, child, is_child=True))
            elif child is not None:
                stack.append(child)
    return found, readers


def _list_parts(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of what an object holds."""
    kind = type(holder)
    if issubclass(kind, dict):
        yield from (("", value) for value in itertools.islice(list(dict.values(holder)), _ITEMS))
    elif issubclass(kind, _CONTAINERS):
        yield from (("", value) for value in itertools.islice(list(holder), _ITEMS))
    elif issubclass(kind, functools.partial):
        yield from (("", v) for v in (holder.func, *holder.args, *holder.keywords.values()))
    elif issubclass(kind, types.MethodType):
        yield "", holder.__self__
    elif issubclass(kind, types.FunctionType):
        for cell in holder.__closure__ or ():
            try:
                yield "", cell.cell_contents
            except ValueError:  # not set yet
                continue
    elif issubclass(kind, weakref.ref):
        yield "", holder()
    else:
        yield from _list_attributes(holder)


def _list_attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    try:
        attributes = dict(object.__getattribute__(holder, "__dict__"))
    except AttributeError:
        attributes = {}
    for owner in type(holder).__mro__:
        for name, member in vars(owner).items():
            if isinstance(member, types.MemberDescriptorType):  # of `__slots__`
                try:
                    attributes[name] = member.__get__(holder)
                except AttributeError:  # not set yet
                    continue
    of_modules = _OF_MODULES if issubclass(type(holder), nn.Module) else ()
    yield from ((name, part) for name, part in attributes.items() if name not in of_modules)


def _is_container(part: Any) -> bool:
    return issubclass(
        type(part),
        (dict, functools.partial, types.MethodType, types.FunctionType, weakref.ref, *_CONTAINERS),
    )


def _is_searched(part: Any) -> bool:
    # The type, not `__class__`, which a proxy can compute.
    kind = type(part)
    if issubclass(kind, _LEAVES) or issubclass(kind, BaseLinearLayerWithLoRA):
        return False
    if _is_container(part) or issubclass(kind, nn.Module):
        return True
    module = str(kind.__module__)
    return module.partition(".")[0] not in _FOREIGN and not module.startswith(_SKIPPED)


def find_refusals(layer: Any) -> Mapping[str, str]:
    """Return module -> the reason why ``layer`` cannot serve LoRA on it.

    Args:
        layer: a LoRA layer, this package's or vLLM's.
    """
    return get_notes(getattr(layer, "base_layer", None)).refusals
