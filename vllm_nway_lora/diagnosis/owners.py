# SPDX-License-Identifier: Apache-2.0
"""Which package has replaced an attribute of vLLM: the module and the file of a function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_nway_lora.compat.patching import Need

#: Packages whose decorators vLLM uses.
_NEUTRAL = frozenset({"torch", "wrapt", *sys.stdlib_module_names})


def find_replaced(needs: Iterable[Need]) -> dict[str, str]:
    """Return the attributes of imported modules that other packages have replaced.

    Args:
        needs: the attributes. Of a class's attribute, its subclasses' are examined too.

    Returns:
        Full name -> the module and the file that replaced it.
    """
    found = {}
    for need in needs:
        module: Any = sys.modules.get(need.module)
        class_name, _, name = need.attribute.rpartition(".")
        owner = getattr(module, class_name, None) if class_name else module
        places = [(f"{need.module}.{class_name}".rstrip("."), owner)]
        places += [(f"{c.__module__}.{c.__name__}", c) for c in _list_subclasses(owner)]
        if who := describe(owner):  # a class of another package
            found[places[0][0]] = who
        for place, holder in places:
            if who := describe(getattr(holder, "__dict__", {}).get(name)):
                found[f"{place}.{name}"] = who
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
