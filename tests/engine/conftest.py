"""Fixtures for engines."""

from __future__ import annotations

import pytest
from support.release import Served, make


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make(tmp_path_factory.mktemp("served"))
