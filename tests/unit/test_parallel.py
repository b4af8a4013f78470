"""The parallel layout: which sizes go together, and how many ranks they need."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.errors import ParallelError
from bridge.megatron.parallel import Parallel


@pytest.mark.parametrize(
    ("sizes", "world", "dp"),
    [
        ({}, 1, 1),
        ({"tp": 2, "sequence_parallel": True}, 2, 1),
        ({"pp": 2, "vpp": 2}, 2, 1),
        ({"ep": 2}, 2, 2),
        ({"tp": 2, "ep": 2}, 2, 1),
        ({"tp": 2, "ep": 2, "etp": 2}, 4, 2),
        ({"tp": 4, "ep": 6, "pp": 2}, 24, 3),
        ({"tp": 2, "cp": 2, "ep": 8, "pp": 2}, 16, 2),
    ],
)
def test_smallest_world(sizes: dict[str, Any], world: int, dp: int) -> None:
    parallel = Parallel(**sizes)
    assert parallel.world_size == world
    assert parallel.dp(world) == dp
    assert parallel.dp(3 * world) == 3 * dp


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp=0"),
        ({"ep": -2}, "ep=-2"),
        ({"pp": True}, "pp=True"),
        ({"cp": 1.5}, r"cp=1\.5"),
        ({"vpp": 2}, "vpp=2 needs pp > 1"),
        ({"sequence_parallel": True}, "sequence_parallel needs tp > 1"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        Parallel(**sizes)


def test_ranks_that_do_not_divide() -> None:
    with pytest.raises(ParallelError, match=r"3 ranks are no multiple of tp × cp × pp = 2 × 1 × 2 = 4"):
        Parallel(tp=2, pp=2).dp(3)
    with pytest.raises(ParallelError, match=r"2 ranks are no multiple of etp × ep × pp = 1 × 4 × 1 = 4"):
        Parallel(tp=2, ep=4).dp(2)


def test_name() -> None:
    assert str(Parallel()) == "1 rank"
    assert str(Parallel(tp=2, pp=2, vpp=2, sequence_parallel=True)) == "TP2+SP PP2 VPP2"
    assert str(Parallel(ep=2, etp=2)) == "EP2 ETP2"
