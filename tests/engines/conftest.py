"""What tests of engines share: the toys, with heads that their kernels take, and a pool of ranks to train them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.kit import ENGINES
from tests.functional.conftest import ranks, toy

__all__ = ["ranks", "toy"]


@pytest.fixture(scope="session", autouse=True)
def engines() -> Path:
    """The environment of the engines. Without it nothing here says anything: that is a failure, not a skip."""
    assert (ENGINES / ".ready").exists(), f"{ENGINES} is not there: `make engines` makes it"
    return ENGINES
