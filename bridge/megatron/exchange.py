"""Keys and values that context-parallel ranks need of each other: exactly the rows that a rank's queries reach.

One all-to-all brings them, and its transpose sums their gradients where the rows came from. For a long document in a
global layer that is what a gather would bring, less what lies in the future; for a sliding layer it is a halo of one
window (more where a vision block reaches further), and documents that lie within one rank bring nothing. Every rank
knows the description of the whole row, so all agree on who sends what without asking.

What is on its way is a `RowExchange`. Between `start` and `wait` there is time to compute; and as the backward pass
runs the same nodes in the opposite order, so there is between the departure of the gradients and their arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Span, places


@dataclass(frozen=True)
class ExchangePlan:
    """Who gets which rows, from the view of one rank.

    `columns`: the places in the row that this rank ends up with, ascending. `send_rows`: local rows, destination after
    destination, `send_counts` of them each; `receive_counts` rows come from each rank. `order`: where each column
    stands in [local rows | received rows].
    """

    columns: tuple[Span, ...]
    send_rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor

    def start(self, x: Tensor, group: dist.ProcessGroup) -> RowExchange:
        """Send for the rows [local rows, ...] of other ranks. Every rank of the group must call it."""
        return RowExchange(self, group, x)


class RowExchange:
    """Rows on their way here, and in the backward pass their gradients on the way back."""

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup, local_rows: Tensor) -> None:
        self.plan, self.group = plan, group
        self._work: dist.Work | None = None
        # What travels must live as long as it does.
        self._sent: Tensor | None = None
        self.grads: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[Tensor, Tensor] | None = local_rows.detach(), _SendRows.apply(local_rows, self)

    def wait(self) -> Tensor:
        """[columns, ...]: local rows and received ones in the order of the row; differentiable. Once."""
        assert self._rows is not None
        local_rows, received = self._rows
        # The graph holds this object: if it held the graph, neither would be freed.
        self._rows = None
        columns: Tensor = _ReceiveRows.apply(local_rows, received, self)
        return columns

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Begin an all-to-all of rows; the tensor it fills is complete after `wait_for_rows`."""
        self._sent = x.contiguous()
        received = x.new_empty(sum(receive_counts), *x.shape[1:])
        self._work = dist.all_to_all_single(
            received, self._sent, receive_counts, send_counts, group=self.group, async_op=True
        )
        return received

    def wait_for_rows(self) -> None:
        """Wait for what was sent last."""
        assert self._work is not None
        self._work.wait()
        self._work = self._sent = None


def exchange_of(visibility: Visibility, rule: MaskRule) -> ExchangePlan:
    """The exchange of one step and rule, planned by the first layer that asks."""
    exchange = visibility.cache.get(("exchange", rule))
    if exchange is None:
        exchange = visibility.cache[("exchange", rule)] = _plan(visibility, rule)
    assert isinstance(exchange, ExchangePlan)
    return exchange


def _plan(visibility: Visibility, rule: MaskRule) -> ExchangePlan:
    zigzag = visibility.zigzag
    assert zigzag is not None
    first, stop = (visibility.host or visibility).reach(rule)
    chunks = (-1, 2 * zigzag.size, zigzag.length // (2 * zigzag.size))
    bounds = torch.stack([first.reshape(chunks).amin((0, 2)), stop.reshape(chunks).amax((0, 2))], 1).tolist()
    # What the queries of one chunk see is one run: they are consecutive, and each sees itself.
    needed = [_merge(bounds[rank], bounds[2 * zigzag.size - 1 - rank]) for rank in range(zigzag.size)]

    def travels(source: int, destination: int) -> list[Span]:
        if source == destination:
            return []
        pairs = [(span, need) for span in zigzag.spans(source) for need in needed[destination]]
        return [(max(a, c), min(b, d)) for (a, b), (c, d) in pairs if max(a, c) < min(b, d)]

    device, rank, local_spans = visibility.index.device, zigzag.rank, zigzag.spans(zigzag.rank)
    outgoing = [travels(rank, other) for other in range(zigzag.size)]
    incoming = [travels(other, rank) for other in range(zigzag.size)]
    send = [_local(span, local_spans) for spans in outgoing for span in spans]
    held = places([*local_spans, *(span for spans in incoming for span in spans)], device)
    return ExchangePlan(
        columns=needed[rank],
        send_rows=places(send, device) if send else torch.zeros(0, dtype=torch.int64, device=device),
        send_counts=[_length(spans) for spans in outgoing],
        receive_counts=[_length(spans) for spans in incoming],
        order=held.argsort(),
    )


def _merge(first: list[int], second: list[int]) -> tuple[Span, ...]:
    """The union of two runs, the first starting earlier, as disjoint spans."""
    if second[0] <= first[1]:
        return ((min(first[0], second[0]), max(first[1], second[1])),)
    return (first[0], first[1]), (second[0], second[1])


def _local(span: Span, local_spans: tuple[Span, Span]) -> Span:
    """Where a span of the row, within one chunk of `local_spans`, stands among a rank's rows."""
    (first, stop), (second, _) = local_spans
    shift = first if span[0] < stop else second - (stop - first)
    return span[0] - shift, span[1] - shift


def _length(spans: list[Span]) -> int:
    return sum(stop - start for start, stop in spans)


class _SendRows(torch.autograd.Function):
    """Own rows -> received rows, which are there once they have arrived."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: RowExchange) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        plan = rows.plan
        return rows.all_to_all(x[plan.send_rows], plan.send_counts, plan.receive_counts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor, None]:
        rows: RowExchange = ctx.rows  # type: ignore[attr-defined]
        rows.wait_for_rows()
        assert rows.grads is not None
        local_grads, returned = rows.grads
        rows.grads = None
        # A row may have gone to several ranks: their gradients are summed in float32, whatever travelled.
        return local_grads.float().index_add_(0, rows.plan.send_rows, returned.float()).to(local_grads.dtype), None


class _ReceiveRows(torch.autograd.Function):
    """Received rows -> columns. Its backward pass sends the gradients off; `_SendRows` collects what comes back.

    The gradient of the local rows waits in the exchange, so that all gradients of a row are summed before one rounding.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, local_rows: Tensor, received: Tensor, rows: RowExchange
    ) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        rows.wait_for_rows()
        return torch.cat([local_rows, received])[rows.plan.order]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        rows: RowExchange = ctx.rows  # type: ignore[attr-defined]
        plan = rows.plan
        held = torch.empty_like(grad)
        held[plan.order] = grad
        received = sum(plan.receive_counts)
        local_grads, others = held.split([len(held) - received, received])
        rows.grads = local_grads, rows.all_to_all(others, plan.receive_counts, plan.send_counts)
        return None, others, None
