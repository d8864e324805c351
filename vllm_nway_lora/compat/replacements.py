# SPDX-License-Identifier: Apache-2.0
"""Functions of this package by name, imported when they replace one of vLLM's.

A process thus imports only the modules that it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import wrapt


def load(path: str) -> Callable[..., Any]:
    """Return the function at ``module:function`` of this package."""
    module, _, function = path.partition(":")
    loaded: Callable[..., Any] = getattr(
        importlib.import_module(f"vllm_nway_lora.{module}"), function
    )
    return loaded


def wrapped_by(path: str) -> Callable[[Any], Any]:
    """Return a replacement that wraps a function of vLLM in the wrapt wrapper at ``path``."""
    return lambda original: wrapt.FunctionWrapper(original, load(path))
