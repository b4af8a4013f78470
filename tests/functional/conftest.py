"""One pool of ranks for all functional tests: importing torch and Megatron takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool
