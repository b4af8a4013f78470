"""How context parallelism cuts a row: 2 * size chunks, of which rank r holds chunk r and chunk 2 * size - 1 - r.

In a causal row early tokens see little and late ones much: with one chunk of either end every rank has the same work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.errors import ParallelError

# Places [start, stop) in a row.
Span = tuple[int, int]


@dataclass(frozen=True)
class Zigzag:
    """The cut of rows of `length` tokens over `size` ranks, seen from `rank`. Raises ParallelError if it is uneven."""

    length: int
    size: int
    rank: int

    def __post_init__(self) -> None:
        if self.length % (2 * self.size):
            raise ParallelError(
                f"a row of {self.length} tokens does not divide into 2 * cp = {2 * self.size} chunks: pad it"
            )

    @classmethod
    def of(cls, length: int, group: torch.distributed.ProcessGroup) -> Zigzag:
        """The cut over a context-parallel group."""
        return cls(length, group.size(), group.rank())

    def spans(self, rank: int) -> tuple[Span, Span]:
        """The two chunks of a rank, in the order of the row."""
        chunk = self.length // (2 * self.size)
        first, second = rank * chunk, (2 * self.size - 1 - rank) * chunk
        return (first, first + chunk), (second, second + chunk)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of `x`, whose axis `dim` is the whole row."""
        if x.shape[dim] != self.length:
            raise ParallelError(f"a tensor {list(x.shape)} has no row of {self.length} tokens on axis {dim}")
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.spans(self.rank)], dim)


def places(spans: list[Span] | tuple[Span, ...], device: torch.device) -> Tensor:
    """The places in the row that ascending `spans` cover: [n] int64."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])
