# SPDX-License-Identifier: Apache-2.0
"""The settings, ``VLLM_NWAY_LORA`` and ``VLLM_NWAY_LORA_CPU``, and their registration with vLLM."""

from __future__ import annotations

import enum
import os
from types import ModuleType

import wrapt

from vllm_nway_lora import __version__

VARIABLE = "VLLM_NWAY_LORA"
#: Turns this package's products on CPU on (``1``, the default) or off (``0``).
CPU_VARIABLE = "VLLM_NWAY_LORA_CPU"


class Mode(enum.Enum):
    """The values of ``VLLM_NWAY_LORA``."""

    ON = "1"
    OFF = "0"
    STRICT = "strict"
    LENIENT = "lenient"


def read_mode() -> Mode:
    """Return the mode that the environment asks for; unset or empty is ``Mode.ON``.

    Raises:
        ValueError: the value is not ``1``, ``0``, ``strict`` or ``lenient``.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or Mode.ON.value
    try:
        return Mode(value)
    except ValueError:
        raise ValueError(
            f"{VARIABLE}={os.environ[VARIABLE]!r} is not a valid value. Set it to one of: 1 (on, the "
            "default), 0 (off: vLLM stays unchanged), strict (refuse to start if a patch cannot be "
            "applied), lenient (serve adapters without the modules that have no layer in the model)."
        ) from None


def is_on(variable: str) -> bool:
    """Return whether a variable that turns a group of patches off is unset, empty or ``1``.

    Raises:
        ValueError: the value is neither ``1`` nor ``0``.
    """
    value = os.environ.get(variable, "").strip() or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{variable}={value!r} is not a valid value. Set it to 1 (on) or 0 (off).")
    return value == "1"


def declare_to_vllm() -> None:
    """Add the variables to ``vllm.envs``, now or when that module is imported.

    vLLM 0.32.0 warns of a ``VLLM_*`` variable that it does not know, and refuses to start under
    ``--fail-on-environ-validation``. It hashes the variables that it knows into the key of its
    compile cache (``vllm/envs.py``: ``compile_factors``).
    """
    wrapt.register_post_import_hook(_declare, "vllm.envs")


def _declare(envs: ModuleType) -> None:
    # A release without that table must still be importable.
    variables = getattr(envs, "environment_variables", {})
    variables[VARIABLE] = _cache_key
    variables[CPU_VARIABLE] = lambda: is_on(CPU_VARIABLE)


def _cache_key() -> str:
    # The value contains the plugin's version, so that a graph compiled with one version's slices is
    # never reused with another's. vLLM reads the value only for its cache key.
    return f"{read_mode().value} (vllm-nway-lora {__version__})"
