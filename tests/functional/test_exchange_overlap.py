"""Keys and values travel while attention is computed, forward and backward, and the result does not depend on it."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Zigzag
from bridge.ranks import RankPool

LENGTH, HEADS, GROUPS, HEAD_DIM = 256, 8, 4, 16


def events_and_differences() -> tuple[list[str], float, float]:
    """On each of two ranks: what happened in which order, and how far it is from one rank: output, worst gradient."""
    from bridge.megatron import core_attention
    from bridge.megatron.core_attention import CoreAttention
    from bridge.megatron.exchange import RowExchange

    groups = initialize(Parallel(cp=2))
    generator = torch.Generator().manual_seed(0)
    shapes = ((LENGTH, 1, HEADS, HEAD_DIM), (LENGTH, 1, GROUPS, HEAD_DIM), (LENGTH, 1, GROUPS, HEAD_DIM))
    whole = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    visibility = Visibility.of(torch.zeros(1, LENGTH, dtype=torch.int64))
    zigzag = Zigzag.of(LENGTH, groups.cp)
    attention = CoreAttention(None, rule=MaskRule(None, "causal"), backend="blockwise", source=0, pg_collection=groups)
    expected = attention(*whole, visibility)
    expected.square().sum().backward()

    events: list[str] = []
    parts = [zigzag.take(tensor.detach(), 0).requires_grad_() for tensor in whole]
    all_to_all, select = RowExchange.all_to_all, core_attention.select

    def logged_send(self: RowExchange, *arguments: object) -> Tensor:
        events.append("all_to_all")
        return all_to_all(self, *arguments)

    def logged_select(*arguments: object) -> object:
        backend = select(*arguments)

        def attend(*tensors: object) -> Tensor:
            events.append("attend")
            output = backend.attend(*tensors)
            output.register_hook(lambda _: events.append("attend"))
            return output

        return backend._replace(attend=attend)

    with patch.object(RowExchange, "all_to_all", logged_send), patch.object(core_attention, "select", logged_select):
        output = attention(*parts, visibility.on(zigzag))
        output.square().sum().backward()

    def relative(part: Tensor, of: Tensor) -> float:
        mine = zigzag.take(of, 0)
        return ((part - mine).norm() / mine.norm()).item()

    gradients = max(relative(part.grad, of.grad) for part, of in zip(parts, whole, strict=True))
    return events, relative(output, expected), gradients


def test_the_next_piece_travels_while_one_is_computed(ranks: RankPool) -> None:
    for events, difference, gradients in ranks.run(events_and_differences, world_size=2):
        # All pieces are on their way before the first is computed; the gradients of one leave before the next
        # one's are computed.
        assert events == ["all_to_all"] * GROUPS + ["attend"] * GROUPS + ["attend", "all_to_all"] * GROUPS
        assert difference <= 1e-6
        assert gradients <= 1e-6
