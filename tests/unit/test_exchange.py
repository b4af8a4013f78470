"""What context-parallel ranks send each other: planned on every rank alike, and no more than is seen."""

from __future__ import annotations

import pytest
import torch

from bridge.errors import ParallelError
from bridge.megatron.exchange import ExchangePlan, exchange_of
from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Zigzag, places

SIZE, LENGTH = 4, 256  # chunks of 32 tokens
CAUSAL, SLIDING = MaskRule(None, "causal"), MaskRule(8, "windowed")


def exchanges(
    rule: MaskRule, bounds: torch.Tensor | None = None, image: tuple[int, int] = (0, 0)
) -> list[ExchangePlan]:
    """The plans of all ranks for one row."""
    types = torch.zeros(1, LENGTH, dtype=torch.int64)
    types[0, slice(*image)] = 1
    row = Visibility.of(torch.zeros_like(types), cu_seqlens=bounds, mm_token_type_ids=types)
    return [exchange_of(row.on(Zigzag(LENGTH, SIZE, rank)), rule) for rank in range(SIZE)]


def fetched(rule: MaskRule, bounds: torch.Tensor | None = None, image: tuple[int, int] = (0, 0)) -> list[int]:
    """Rows that each rank receives."""
    return [sum(plan.receive_counts) for plan in exchanges(rule, bounds, image)]


def test_a_rank_fetches_what_its_queries_see() -> None:
    # Global: everything before the end of the later chunk, but the own chunks.
    assert fetched(CAUSAL) == [192, 160, 128, 96]
    # Sliding: one window before each chunk; before the row there is nothing, and the last rank's chunks adjoin.
    assert fetched(SLIDING) == [7, 14, 14, 7]
    # An image of 20 tokens across a border is seen whole by the rank before it.
    assert fetched(SLIDING, image=(22, 42)) == [7 + 10, 14, 14, 7]
    # Documents that end where chunks do.
    assert fetched(CAUSAL, torch.arange(0, LENGTH + 1, 32)) == [0, 0, 0, 0]


@pytest.mark.parametrize("rule", [CAUSAL, SLIDING, MaskRule(8, "full")])
def test_ranks_agree_on_who_sends_what(rule: MaskRule) -> None:
    plans = exchanges(rule, torch.tensor([0, 50, 130, 256]), (40, 75))
    row = torch.arange(LENGTH)
    own = [Zigzag(LENGTH, SIZE, rank).take(row, 0) for rank in range(SIZE)]
    for rank, plan in enumerate(plans):
        assert plan.receive_counts == [other.send_counts[rank] for other in plans]
        sent = [own[source][other.send_rows].split(other.send_counts)[rank] for source, other in enumerate(plans)]
        held = torch.cat([own[rank], *sent])
        assert torch.equal(held[plan.order], places(plan.columns, row.device))


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ParallelError, match="a row of 250 tokens does not divide into 2 \\* cp = 8 chunks"):
        Zigzag(250, SIZE, 0)
    with pytest.raises(ParallelError, match="no row of 256 tokens on axis 1"):
        Zigzag(LENGTH, SIZE, 0).take(torch.zeros(1, 128))
