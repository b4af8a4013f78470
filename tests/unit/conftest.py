"""Fixtures of the unit tests: a toy without weights, folders of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from .blend_cases import write_sources
from .data_helpers import model_folder, picture_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E2B's folder without weights, to be read."""
    return model_folder(tmp_path_factory.mktemp("model") / "e2b")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `write_sources`, to be read."""
    return write_sources(tmp_path_factory.mktemp("files"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures; one more beside it."""
    return picture_folder(tmp_path)
