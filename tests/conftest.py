"""Fixtures that several suites use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session", params=[1, 2, 4], ids="tp{}".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Yield a tensor-parallel group of real processes; all tests of one size share it."""
    group = Ranks(request.param)
    yield group
    group.close()
