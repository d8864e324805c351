"""The table of releases."""

from __future__ import annotations

import pytest
from packaging.version import Version

from vllm_nway_lora.compat import releases
from vllm_nway_lora.compat.releases import KNOWN, TESTED, Support


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.16.9", Support.TOO_OLD),
        ("0.17.1", Support.TESTED),
        ("0.32.0+cpu", Support.TESTED),
        ("0.32.0.dev3", Support.UNTESTED),
        ("0.32.0.post1", Support.UNTESTED),
        ("0.33.1", Support.UNTESTED),
        ("1.0", Support.UNTESTED),
        ("dev", Support.UNTESTED),
        ("", Support.UNTESTED),
    ],
)
def test_support(version: str, expected: Support) -> None:
    assert releases.support(version) is expected


def test_known_releases_are_in_order() -> None:
    assert list(KNOWN) == sorted(KNOWN, key=Version)
    assert set(TESTED) <= set(KNOWN)
