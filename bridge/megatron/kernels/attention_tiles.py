"""What the kernels of `attention_backward` are told of a mask, in tiles of queries and of columns. No Triton here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Queries, and columns (keys and values), of a tile.
TILE = 128


class Runs(NamedTuple):
    """What sees what, all int32, on the device of the tensors.

    `first`, `stop`, `row_document` [b, sq], `column_document` [b, sk]: a query sees the columns from `first` to before
    `stop` that are of its document. `low`, `high` [b, row tiles]: the tiles of columns that any query of a tile sees,
    neither ever decreasing. `row_low`, `row_high` [b, column tiles]: the same, transposed.
    """

    first: Tensor
    stop: Tensor
    row_document: Tensor
    column_document: Tensor
    low: Tensor
    high: Tensor
    row_low: Tensor
    row_high: Tensor


class TileRange(NamedTuple):
    """Tiles of queries that share the workspace, and the tiles of columns that any of them sees: all [start, stop)."""

    row_start: int
    row_stop: int
    column_start: int
    column_stop: int

    @property
    def tiles(self) -> int:
        return (self.row_stop - self.row_start) * (self.column_stop - self.column_start)


def plan(low: Sequence[int], high: Sequence[int], most: int) -> list[TileRange]:
    """Tiles of queries, which see the tiles of columns `low` to before `high`, in parts of at most `most` tiles.

    A tile of queries is never split: one alone may have more.
    """
    parts: list[TileRange] = []
    for row, (start, stop) in enumerate(zip(low, high, strict=True)):
        single = TileRange(row, row + 1, start, stop)
        if parts:
            last = parts[-1]
            joined = TileRange(last.row_start, row + 1, min(last.column_start, start), max(last.column_stop, stop))
            if joined.tiles <= most:
                parts[-1] = joined
                continue
        parts.append(single)
    return parts
