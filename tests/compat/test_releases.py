"""The table of releases."""

from __future__ import annotations

import pytest
from packaging.version import Version

from vllm_nway_lora.compat import releases
from vllm_nway_lora.compat.defects import DEFECTS
from vllm_nway_lora.compat.releases import KNOWN, TESTED, Support


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.16.9", Support.TOO_OLD),
        ("0.16.9rc1", Support.TOO_OLD),
        ("0.1.dev1+g1234567", Support.UNTESTED),
        ("0.1.dev18429+g1234567.d20261101", Support.UNTESTED),
        ("0.17.0.dev2", Support.UNTESTED),
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


@pytest.mark.parametrize("version", ["0.1.dev1+g1234567", "dev", ""])
def test_version_without_a_release_counts_as_the_newest(version: str) -> None:
    assert releases.parse(version) is None
    for defect in DEFECTS:
        assert defect.affects(version) == (defect.seen[-1].last is None)


def test_parse_ignores_the_build() -> None:
    assert str(releases.parse("0.32.0+cpu")) == "0.32.0"
    assert str(releases.parse("0.34.0.dev12+g0a1b2c3")) == "0.34.0.dev12"


def test_known_releases_are_in_order() -> None:
    assert list(KNOWN) == sorted(KNOWN, key=Version)
    assert set(TESTED) <= set(KNOWN)
