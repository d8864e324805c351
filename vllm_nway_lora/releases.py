# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM this package knows. The only place where version numbers are written."""

from __future__ import annotations

import enum

from packaging.version import InvalidVersion, Version

#: The first release with Qwen3.5, and so the first with a projection that needs this package.
FIRST = Version("0.17.0")

#: The releases that the test suites pass on.
TESTED = frozenset({Version("0.32.0")})


class Support(enum.Enum):
    """How a running vLLM relates to the releases that this package knows."""

    TESTED = "tested"
    UNTESTED = "untested"
    TOO_OLD = "too old"


def support(version: str) -> Support:
    """Classify a version string as vLLM reports it (``vllm.__version__``).

    A local part, as in ``0.32.0+cpu``, says how a release was built and is not looked at. A
    version that cannot be parsed, such as a source checkout's, is untested rather than an error.
    """
    try:
        release = Version(version)
    except InvalidVersion:
        return Support.UNTESTED
    if Version(release.base_version) < FIRST:
        return Support.TOO_OLD
    return Support.TESTED if Version(release.public) in TESTED else Support.UNTESTED


def gathers_what_is_whole(version: str) -> bool:
    """Tell whether vLLM's LoRA on pairs gathers over all ranks what no rank lacks: to 0.24.0."""
    try:
        return Version(Version(version).base_version) < Version("0.25.0")
    except InvalidVersion:
        return False
