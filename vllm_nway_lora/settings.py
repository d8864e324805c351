# SPDX-License-Identifier: Apache-2.0
"""The one setting, ``VLLM_NWAY_LORA``, and how vLLM learns its name."""

from __future__ import annotations

import enum
import os
from types import ModuleType

import wrapt

from vllm_nway_lora import __version__

VARIABLE = "VLLM_NWAY_LORA"


class Mode(enum.Enum):
    """What ``VLLM_NWAY_LORA`` asks for."""

    ON = "1"
    OFF = "0"
    STRICT = "strict"
    LENIENT = "lenient"


def read_mode() -> Mode:
    """Return the mode that the environment asks for; unset or empty is ``Mode.ON``.

    Raises:
        ValueError: the value is none of ``1``, ``0``, ``strict`` and ``lenient``.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or Mode.ON.value
    try:
        return Mode(value)
    except ValueError:
        raise ValueError(
            f"{VARIABLE}={os.environ[VARIABLE]!r} is not a value of this variable. Set it to one "
            "of: 1 (on, the default), 0 (off: vLLM is left as it is), strict (refuse to start "
            "where vllm-nway-lora cannot do its whole job), lenient (serve adapters without the "
            "modules that have no layer in the model)."
        ) from None


def declare_to_vllm() -> None:
    """Add the variable to ``vllm.envs``, at once or when that module is imported.

    vLLM 0.32.0 refuses to start on a ``VLLM_*`` variable that it does not know under
    ``--fail-on-environ-validation`` and warns of it otherwise; and it hashes the variables that it
    does know into the key of its compile cache (``vllm/envs.py``: ``compile_factors``).
    """
    wrapt.register_post_import_hook(_declare, "vllm.envs")


def _declare(envs: ModuleType) -> None:
    envs.environment_variables[VARIABLE] = _cache_key


def _cache_key() -> str:
    # The plugin's version is in it so that a graph compiled with one version's slices is never
    # reused with another's. vLLM reads the value for its cache key and for nothing else.
    return f"{read_mode().value} (vllm-nway-lora {__version__})"
