"""Fixtures for tests with engines."""

from __future__ import annotations

import pytest
from support.adapters import ServedModel
from support.release import save_model_of_release


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return save_model_of_release(tmp_path_factory.mktemp("served"))
