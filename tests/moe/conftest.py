"""Fixtures for engines with experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.adapters import ServedModel
from support.moe_adapters import save_rows
from support.moe_checks import CLASSES


@pytest.fixture(scope="session")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServedModel]:
    """Return a function that saves a model of :data:`CLASSES` and its adapters on first use."""
    saved: dict[str, ServedModel] = {}

    def get(name: str) -> ServedModel:
        if name not in saved:
            saved[name] = save_rows(tmp_path_factory.mktemp(name), CLASSES[name])
        return saved[name]

    return get
