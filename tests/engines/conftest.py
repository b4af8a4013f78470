"""What tests of engines share: the toys, with heads that their kernels take, and a pool of ranks to train them."""

from __future__ import annotations

import pytest

from tests.engines.kit import ROOT
from tests.functional.conftest import ranks, toy

__all__ = ["ranks", "toy"]


@pytest.fixture(scope="module", autouse=True)
def environment(request: pytest.FixtureRequest) -> None:
    """What a file's tests run in: its `NEEDS`, or vLLM's. Without it nothing is said: a failure, not a skip."""
    needed = ROOT / getattr(request.module, "NEEDS", ".venv-engines/.ready")
    assert needed.exists(), f"{needed} is not there: `make engines` makes it, or says why it cannot"
