"""Fixtures for engines."""

from __future__ import annotations

import pytest
from support.adapters import Served
from support.release import make


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make(tmp_path_factory.mktemp("served"))
