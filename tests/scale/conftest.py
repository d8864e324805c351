"""Fixtures of the suite that needs servers and engines for minutes."""

from __future__ import annotations

import pytest
from support.scale import Served, save_served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return save_served(tmp_path_factory.mktemp("served"))
