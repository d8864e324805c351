"""Fixtures that more than one suite uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session", params=[1, 2, 4], ids="tp{}".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A tensor-parallel group of real processes, kept for all tests of its size."""
    group = Ranks(request.param)
    yield group
    group.close()
