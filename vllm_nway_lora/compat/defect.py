# SPDX-License-Identifier: Apache-2.0
"""What is known of a defect of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from vllm_nway_lora.compat import releases


@dataclass(frozen=True)
class Seen:
    """The symptom of a defect in a range of releases.

    Attributes:
        first: first affected release.
        last: last affected release; None if the newest known release is affected.
        messages: parts of vLLM's error messages, one of which appears; empty if vLLM reports nothing.
    """

    first: str
    last: str | None
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Defect:
    """A fault, or a needless cost, of stock vLLM.

    This package fixes the defects that a group of patches names.

    Attributes:
        name: its name in messages, tests and the documentation.
        user_sees: one sentence from the user's side.
        seen: affected releases and symptoms, oldest releases first.
        upstream: threads about it.
        retired_by: the upstream change that makes this package's fix needless.
    """

    name: str
    user_sees: str
    seen: tuple[Seen, ...]
    upstream: tuple[str, ...]
    retired_by: str

    def messages(self, version: str) -> tuple[str, ...] | None:
        """Return the messages of ``version`` of vLLM; None if that version lacks the defect."""
        release = releases.parse(version)
        for seen in self.seen:
            if seen.last is None and (release is None or Version(seen.first) <= release):
                return seen.messages
            if release and seen.last and Version(seen.first) <= release <= Version(seen.last):
                return seen.messages
        return None

    def affects(self, version: str) -> bool:
        """Return whether ``version`` of vLLM has the defect."""
        return self.messages(version) is not None
