# SPDX-License-Identifier: Apache-2.0
"""The vLLM releases that this package supports.

Version numbers are written only here, in :mod:`vllm_nway_lora.compat.defects` and in
``ci/matrix.toml``.
"""

from __future__ import annotations

import enum

from packaging.version import InvalidVersion, Version

#: The supported releases, oldest first. Their sources have been read, and ``ci/matrix.toml`` has a
#: row for each. The oldest is the first release with Qwen3.5, the first model that needs this package.
KNOWN = (
    *("0.17.0", "0.17.1", "0.18.0", "0.18.1", "0.19.0", "0.19.1"),
    *("0.20.0", "0.20.1", "0.20.2", "0.21.0", "0.22.0", "0.22.1", "0.23.0", "0.24.0"),
    *("0.25.0", "0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0"),
    *("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
)

#: The releases on which the suites have passed, as recorded in ``ci/results``.
TESTED = KNOWN

FIRST = Version(KNOWN[0])
LAST = Version(KNOWN[-1])


class Support(enum.Enum):
    """How this package supports a vLLM version."""

    TESTED = "tested"
    UNTESTED = "untested"
    TOO_OLD = "too old"


def parse(version: str) -> Version | None:
    """Return a vLLM version without its local part, such as ``+cpu``, which describes the build.

    Returns None for a version that counts as newer than every release: one that cannot be parsed, or
    a development version before :data:`FIRST`. A build of vLLM's sources without tags is named
    ``0.1.dev1+g1234567``, however new the sources are.
    """
    try:
        release = Version(Version(version).public)
    except InvalidVersion:
        return None
    is_unknown = release.is_devrelease and Version(release.base_version) < FIRST
    return None if is_unknown else release


def support(version: str) -> Support:
    """Return how this package supports ``version``, as ``vllm.__version__`` reports it."""
    release = parse(version)
    if release is None:
        return Support.UNTESTED
    if Version(release.base_version) < FIRST:
        return Support.TOO_OLD
    return Support.TESTED if release.public in TESTED else Support.UNTESTED
