"""A mask rule applied to a batch, for the queries and keys that one rank holds; what every backend is given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.megatron.exchange import exchange_of
from bridge.megatron.visibility import MaskRule, Reach, Visibility
from bridge.megatron.zigzag import Span, places


class Tile(NamedTuple):
    """A run of queries and the keys that any of them sees, all as slices of what the rank holds.

    Between `full_start` and `full_stop` every one of these queries sees every key: no elementwise mask there.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    full_start: int
    full_stop: int

    def pieces(self, size: int) -> list[tuple[int, int, bool]]:
        """The keys in pieces of at most `size`: (start, stop, whether an elementwise mask is needed)."""
        bounds = (self.key_start, self.full_start, self.full_stop, self.key_stop)
        return [
            (start, min(start + size, bounds[part + 1]), part != 1)
            for part in range(3)
            for start in range(bounds[part], bounds[part + 1], size)
        ]


@dataclass(frozen=True)
class Mask:
    """`rule` on the rows of `visibility`, for queries at the places `rows` and keys at the places `columns`.

    Everything but `dense` is linear in the length of the row. Masks are made once a step and rule (`mask_of`), and
    layers of one kind share them, with what backends derive from them (`cache`).
    """

    visibility: Visibility
    rule: MaskRule
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    cache: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def row_places(self) -> Tensor:
        """[sq]: where in the row the queries stand."""
        return places(self.rows, self.visibility.index.device)

    @cached_property
    def column_places(self) -> Tensor:
        """[sk]: where in the row the keys stand, ascending."""
        return places(self.columns, self.visibility.index.device)

    @cached_property
    def reach(self) -> Reach:
        """[b, sq] twice: the places that each query sees, if they are of its document."""
        return Reach(*(x[:, self.row_places] for x in self.visibility.reach(self.rule)))

    @cached_property
    def row_document(self) -> Tensor:
        """[b, sq]"""
        return self.visibility.document[:, self.row_places]

    @cached_property
    def column_document(self) -> Tensor:
        """[b, sk]"""
        return self.visibility.document[:, self.column_places]

    @cached_property
    def on_host(self) -> Mask:
        """The same mask where decisions are made (`Visibility.host`)."""
        return self if self.visibility.host is None else mask_of(self.visibility.host, self.rule)

    @cached_property
    def contiguous(self) -> Tensor:
        """[] bool, on the host: whether every document is one run of tokens, so that intervals alone decide."""
        if self.on_host is not self:
            return self.on_host.contiguous
        document = self.visibility.document
        borders = (document[:, 1:] != document[:, :-1]).sum(1) + 1
        ordered = document.sort(1).values
        return (borders == (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).all()

    @cached_property
    def causal(self) -> bool:
        """Whether every query sees all of its document up to itself, and nothing else."""
        if self.on_host is not self:
            return self.on_host.causal
        first, stop = self.reach
        document = self.visibility.reach(MaskRule(None, "causal")).first[:, self.row_places]
        return bool((self.contiguous & (first == document).all() & (stop == self.row_places + 1).all()).item())

    @cached_property
    def whole_rows(self) -> bool:
        """Whether every row is one document."""
        if self.on_host is not self:
            return self.on_host.whole_rows
        return bool((self.visibility.document == self.visibility.document[:, :1]).all().item())

    @property
    def dense(self) -> Tensor:
        """[b, sq, sk] bool. Quadratic: for the reference backend and for short rows."""
        if "dense" not in self.cache:
            whole = self.visibility.dense(self.rule)
            self.cache["dense"] = whole[:, self.row_places][:, :, self.column_places]
        dense = self.cache["dense"]
        assert isinstance(dense, Tensor)
        return dense

    def between(self, rows: slice, columns: slice) -> Tensor:
        """[b, rows, columns] bool: which of some queries see which of some keys."""
        first, stop = (x[:, rows, None] for x in self.reach)
        place = self.column_places[None, None, columns]
        same = self.row_document[:, rows, None] == self.column_document[:, None, columns]
        return (first <= place) & (place < stop) & same

    def tiles(self, size: int) -> list[Tile]:
        """The queries in tiles of at most `size`, which never straddle two spans."""
        if self.on_host is not self:
            return self.on_host.tiles(size)
        tiles = self.cache.get(("tiles", size))
        if tiles is None:
            tiles = self.cache[("tiles", size)] = self._tiles(size)
        assert isinstance(tiles, list)
        return tiles

    def _tiles(self, size: int) -> list[Tile]:
        cuts, offset = [], 0
        for start, stop in self.rows:
            length = stop - start
            cuts += [(offset + i, offset + min(i + size, length)) for i in range(0, length, size)]
            offset += length
        lengths = torch.tensor([stop - start for start, stop in cuts], device=self.row_places.device)
        tile = torch.repeat_interleave(torch.arange(len(cuts), device=lengths.device), lengths)

        def per_tile(x: Tensor, reduce: str) -> Tensor:
            x = x.amin(0) if reduce == "amin" else x.amax(0)
            return x.new_zeros(len(cuts)).scatter_reduce(0, tile, x, reduce, include_self=False)

        first, stop_before = self.reach
        full_start, full_stop = per_tile(first, "amax"), per_tile(stop_before, "amin")
        full_stop = torch.where(self.contiguous, full_stop, full_start)
        bounds = torch.stack(
            [per_tile(first, "amin"), per_tile(stop_before, "amax"), full_start, full_stop], 1
        ).tolist()
        return [self._tile(*rows, *bound) for rows, bound in zip(cuts, bounds, strict=True)]

    def _tile(self, start: int, stop: int, first: int, last: int, full_first: int, full_last: int) -> Tile:
        # What consecutive queries see is one run, and lies in one span: from places to columns is a shift.
        offset = 0
        for span in self.columns:
            if first < span[1]:
                break
            offset += span[1] - span[0]
        shift = offset - span[0]
        if full_last <= full_first:
            full_first = full_last = first
        return Tile(start, stop, first + shift, last + shift, full_first + shift, full_last + shift)


def mask_of(visibility: Visibility, rule: MaskRule) -> Mask:
    """The mask of this rank's queries under `rule`, made once a step.

    Its columns are the whole row, and under context parallelism what `exchange_of` fetches.
    """
    mask = visibility.cache.get(("mask", rule))
    if mask is None:
        if visibility.zigzag is None:
            rows: tuple[Span, ...] = ((0, visibility.index.shape[1]),)
            columns = rows
        else:
            rows = visibility.zigzag.spans(visibility.zigzag.rank)
            columns = exchange_of(visibility, rule).columns
        # Of a description that does not hold the mask in turn: a ring would stay, on the device, until Python looks for
        # such rings, which it seldom does.
        uncached = replace(visibility, cache={})
        mask = visibility.cache[("mask", rule)] = Mask(uncached, rule, rows, columns)
    assert isinstance(mask, Mask)
    return mask
