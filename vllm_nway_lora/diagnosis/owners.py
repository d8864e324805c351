# SPDX-License-Identifier: Apache-2.0
"""Which package has replaced an attribute of vLLM: the module and the file of a function."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from vllm_nway_lora.compat.patching import Need

#: Packages whose decorators vLLM uses.
_NEUTRAL = frozenset({"torch", "wrapt", *sys.stdlib_module_names})


def find_replaced(
    needs: Iterable[Need], classes: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return the attributes of imported modules that other packages have replaced.

    Args:
        needs: the attributes. Of a class's attribute, that of its bases and subclasses is examined too.
        classes: full name -> the class of vLLM's that had that name before. Modules of vLLM that have
            another class by its name, or by that of vLLM's subclasses of it, are examined too.

    Returns:
        Full name -> what is there now, a function or a class.
    """
    found: dict[str, Any] = {}
    for need in needs:
        module: Any = sys.modules.get(need.module)
        class_name, _, name = need.attribute.rpartition(".")
        if not class_name:
            found |= _keep_foreign({str(need): vars(module).get(name) if module else None})
            continue
        full_name = f"{need.module}.{class_name}"
        owner = getattr(module, class_name, None)
        before = (classes or {}).get(full_name, owner)
        holders: dict[Any, None] = dict.fromkeys([owner, before, *_list_subclasses(before)])
        if full_name in (classes or {}):
            names = {c.__name__ for c in holders if inspect.isclass(c) and not describe(c)}
            found |= _keep_foreign(_list_bindings({*names, class_name}))
        found |= _keep_foreign({full_name: owner})
        for holder in holders:
            # The attribute of a base class is the owner's too.
            bases = holder.__mro__ if inspect.isclass(holder) and holder is owner else (holder,)
            for base in bases:
                if name in getattr(base, "__dict__", {}):
                    place = f"{base.__module__}.{base.__name__}.{name}"
                    found |= _keep_foreign({place: vars(base)[name]})
                    break
    return found


def describe(attribute: Any) -> str:
    """Return the module and the file of a class or of the outermost function of another package.

    Returns nothing for vLLM's, and for what is neither.
    A wrapper that copies the attributes of what it wraps (``functools.wraps``) has the name of vLLM's
    module, but its code has its own.
    """
    for function in _unwrap(attribute):
        if inspect.isclass(function):
            space = getattr(sys.modules.get(function.__module__), "__dict__", {})
            space = space or {"__name__": function.__module__}
        else:
            space = getattr(function, "__globals__", {})
        module = str(space.get("__name__", "builtins"))
        package = module.partition(".")[0]
        if package == "vllm":
            return ""
        if package != "vllm_nway_lora" and package not in _NEUTRAL:
            file = space.get("__file__")
            return f"{module} ({file})" if file else module
    return ""


def calls_on(attribute: Any, name: str, replaced: Any) -> bool:
    """Return whether a function of another package can call what it has replaced.

    It calls its base class's attribute of the same name, or it keeps what it has replaced in a closure,
    in its module, as a default or as ``__wrapped__``.

    Args:
        attribute: the function.
        name: the attribute's own name.
        replaced: what was there before; None if it is not known.
    """
    wrapped = list(_unwrap(attribute))
    if replaced is not None and any(part is replaced for part in _list_layers(attribute)):
        return True
    for function in wrapped:
        if not isinstance(function, FunctionType):
            continue
        names = function.__code__.co_names
        if "super" in names and name in names:
            return True
        held = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
        held += [function.__globals__[n] for n in names if n in function.__globals__]
        held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in held if replaced is not None else ():
            if any(layer is replaced for layer in _list_layers(value)):
                return True
    return False


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _keep_foreign(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {place: attribute for place, attribute in attributes.items() if describe(attribute)}


def _list_bindings(names: set[str]) -> dict[str, Any]:
    """Return the classes that modules of vLLM have by one of ``names``."""
    return {
        f"{module_name}.{name}": vars(module)[name]
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("vllm.") and hasattr(module, "__dict__")
        for name in names & vars(module).keys()
        if inspect.isclass(vars(module)[name])
    }


def _list_layers(attribute: Any) -> Iterator[Any]:
    """Yield a function as it is, what it binds, and those that it wraps, the outermost first."""
    while attribute is not None:
        yield attribute
        function = getattr(attribute, "__func__", None)  # of a method
        if function is not None:
            yield function
        if isinstance(attribute, functools.partial):
            yield from _list_layers(attribute.func)
        # A bound wrapt wrapper has the one in the class as its parent.
        parent = getattr(attribute, "_self_parent", None)
        if parent is not None:
            yield parent
        attribute = getattr(attribute, "__wrapped__", None)


def _unwrap(attribute: Any) -> Iterator[Any]:
    """Yield a function and those that it wraps, the outermost first."""
    while attribute is not None:
        function = getattr(attribute, "_self_wrapper", attribute)  # of a wrapt wrapper
        function = getattr(function, "__func__", function)  # of a class method
        yield getattr(function, "func", function)  # of a functools.partial
        attribute = getattr(attribute, "__wrapped__", None)


def _list_subclasses(owner: Any) -> Iterator[type]:
    if inspect.isclass(owner):
        for subclass in type.__subclasses__(owner):
            yield subclass
            yield from _list_subclasses(subclass)
