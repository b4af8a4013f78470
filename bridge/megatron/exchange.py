"""Keys and values that context-parallel ranks need of each other: exactly the rows that a rank's queries reach.

One all-to-all brings them, and its transpose sums their gradients where the rows came from. For a long document in a
global layer that is what a gather would bring, less what lies in the future; for a sliding layer it is a halo of one
window (more where a vision block reaches further), and documents that lie within one rank bring nothing. Every rank
knows the description of the whole row, so all agree on who sends what without asking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Span, places


@dataclass(frozen=True)
class Exchange:
    """Who gets which rows, from the view of one rank.

    `columns`: the places in the row that this rank ends up with, ascending. `send`: local rows, destination after
    destination, `send_counts` of them each; `receive_counts` rows come from each rank. `order`: where each column
    stands in [own rows | received rows].
    """

    columns: tuple[Span, ...]
    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor

    def fetch(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[own rows, ...] -> [columns, ...], differentiable. Every rank of the group must call it."""
        fetched: Tensor = _Fetch.apply(x, self, group)
        return fetched


def exchange_of(visibility: Visibility, rule: MaskRule) -> Exchange:
    """The exchange of one step and rule, planned by the first layer that asks (one transfer to the host)."""
    exchange = visibility.cache.get(("exchange", rule))
    if exchange is None:
        exchange = visibility.cache[("exchange", rule)] = _plan(visibility, rule)
    assert isinstance(exchange, Exchange)
    return exchange


def _plan(visibility: Visibility, rule: MaskRule) -> Exchange:
    zigzag = visibility.zigzag
    assert zigzag is not None
    first, stop = visibility.reach(rule)
    chunks = (-1, 2 * zigzag.size, zigzag.length // (2 * zigzag.size))
    bounds = torch.stack([first.reshape(chunks).amin((0, 2)), stop.reshape(chunks).amax((0, 2))], 1).tolist()
    # What the queries of one chunk see is one run: they are consecutive, and each sees itself.
    needed = [_merge(bounds[rank], bounds[2 * zigzag.size - 1 - rank]) for rank in range(zigzag.size)]

    def travels(source: int, destination: int) -> list[Span]:
        if source == destination:
            return []
        pairs = [(own, need) for own in zigzag.spans(source) for need in needed[destination]]
        return [(max(a, c), min(b, d)) for (a, b), (c, d) in pairs if max(a, c) < min(b, d)]

    device, rank, own = visibility.index.device, zigzag.rank, zigzag.spans(zigzag.rank)
    outgoing = [travels(rank, other) for other in range(zigzag.size)]
    incoming = [travels(other, rank) for other in range(zigzag.size)]
    send = [_local(span, own) for spans in outgoing for span in spans]
    held = places([*own, *(span for spans in incoming for span in spans)], device)
    return Exchange(
        columns=needed[rank],
        send=places(send, device) if send else torch.zeros(0, dtype=torch.int64, device=device),
        send_counts=[_length(spans) for spans in outgoing],
        receive_counts=[_length(spans) for spans in incoming],
        order=held.argsort(),
    )


def _merge(first: list[int], second: list[int]) -> tuple[Span, ...]:
    """The union of two runs, the first starting earlier, as disjoint spans."""
    if second[0] <= first[1]:
        return ((min(first[0], second[0]), max(first[1], second[1])),)
    return (first[0], first[1]), (second[0], second[1])


def _local(span: Span, own: tuple[Span, Span]) -> Span:
    """Where a span of the row, within one chunk of `own`, stands among a rank's rows."""
    (first, stop), (second, _) = own
    shift = first if span[0] < stop else second - (stop - first)
    return span[0] - shift, span[1] - shift


def _length(spans: list[Span]) -> int:
    return sum(stop - start for start, stop in spans)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, exchange: Exchange, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.exchange, ctx.group = exchange, group  # type: ignore[attr-defined]
        received = _all_to_all(x[exchange.send], exchange.send_counts, exchange.receive_counts, group)
        return torch.cat([x, received])[exchange.order]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange: Exchange = ctx.exchange  # type: ignore[attr-defined]
        held = torch.empty_like(grad)
        held[exchange.order] = grad
        received = sum(exchange.receive_counts)
        own, others = held.split([len(held) - received, received])
        back = _all_to_all(others, exchange.receive_counts, exchange.send_counts, ctx.group)  # type: ignore[attr-defined]
        # A row may have gone to several ranks: their gradients are summed in float32, whatever travelled.
        total = own.float().index_add_(0, exchange.send, back.float())
        return total.to(grad.dtype), None, None


def _all_to_all(x: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x.new_empty(sum(receive_counts), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive_counts, send_counts, group=group)
    return received
