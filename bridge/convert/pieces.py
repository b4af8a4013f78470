"""A plan: for every destination tensor, which rows of which source tensors it consists of, and reading by it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.convert.dtypes import can_convert, convert
from bridge.errors import MappingError
from bridge.hf.tensors import ITEM_SIZES, RowReader, TensorSpec, as_bytes, check_rows, num_rows, printable, row_elements

_SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """`num_rows` rows of the source tensor `src_name` from `src_row` on become rows from `dst_row` on."""

    dst_row: int
    src_name: str
    src_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """A destination tensor and the pieces that it consists of.

    Source and destination need not have the same shape, only the same number of elements a row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def spec(self) -> TensorSpec:
        """The tensor as a writer wants it."""
        return TensorSpec(self.name, self.dtype, self.shape)


def same_tensors(reader: RowReader) -> list[CopyTensor]:
    """The plan that copies every tensor as it is."""
    return [
        CopyTensor(name, info.dtype, tuple(info.shape), (Piece(0, name, 0, num_rows(tuple(info.shape))),))
        for name, info in reader.tensors.items()
    ]


def plan_digest(tensors: Iterable[CopyTensor], *options: object) -> str:
    """A digest of a plan and of whatever else decides the result, to recognise an interrupted copy by."""
    digest = hashlib.blake2b(digest_size=20)
    for item in (*options, *tensors):
        digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()


class Scratch:
    """A thread's buffer for source rows that change their dtype on the way."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def view(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(nbytes, dtype=np.uint8)
        return memoryview(self._buffer)[:nbytes]


class PlannedTensor:
    """The rows of one destination tensor, read from its pieces."""

    def __init__(self, tensor: CopyTensor, reader: RowReader) -> None:
        self.tensor, self.reader = tensor, reader
        self.item_size = ITEM_SIZES.get(tensor.dtype, 0)
        if not self.item_size:
            raise MappingError(f"tensor {printable(tensor.name)}: dtype {printable(tensor.dtype)} is not supported")
        self.elements = row_elements(tensor.shape)
        self.pieces = self._checked_pieces()
        self._starts = [piece.dst_row for piece in self.pieces]

    def _checked_pieces(self) -> list[Piece]:
        """The pieces in order, neighbours joined. Raises MappingError unless they cover the tensor exactly once."""
        where = f"tensor {printable(self.tensor.name)}"
        merged: list[Piece] = []
        end = 0
        for piece in sorted(self.tensor.pieces, key=lambda piece: piece.dst_row):
            source = self.reader.tensors.get(piece.src_name)
            if source is None:
                raise MappingError(f"{where} is made of {printable(piece.src_name)}, which the source does not have")
            if piece.num_rows <= 0 or piece.src_row < 0 or piece.src_row + piece.num_rows > num_rows(source.shape):
                raise MappingError(
                    f"{where} takes rows {piece.src_row} to {piece.src_row + piece.num_rows} of "
                    f"{printable(piece.src_name)}, which has {num_rows(source.shape)}"
                )
            if row_elements(source.shape) != self.elements:
                raise MappingError(
                    f"{where} {self.tensor.shape} takes rows of {printable(piece.src_name)} {tuple(source.shape)}: "
                    f"{self.elements} and {row_elements(source.shape)} elements a row"
                )
            if not can_convert(source.dtype, self.tensor.dtype):
                raise MappingError(f"{where}: {source.dtype} cannot be converted to {self.tensor.dtype}")
            if piece.dst_row != end:
                low, high = sorted((piece.dst_row, end))
                what = "come from nowhere" if piece.dst_row > end else "come from two places"
                raise MappingError(f"{where}: rows {low} to {high} {what}")
            end += piece.num_rows
            last = merged[-1] if merged else None
            if last and last.src_name == piece.src_name and last.src_row + last.num_rows == piece.src_row:
                merged[-1] = Piece(last.dst_row, last.src_name, last.src_row, last.num_rows + piece.num_rows)
            else:
                merged.append(piece)
        if end != num_rows(self.tensor.shape):
            raise MappingError(f"{where}: its pieces have {end} rows, its shape {num_rows(self.tensor.shape)}")
        return merged

    def fill(self, start: int, stop: int, out: memoryview, scratch: Scratch) -> None:
        """Fill `out` with rows [start, stop)."""
        step = self.elements * self.item_size
        if not step:
            return
        index = bisect_right(self._starts, start) - 1
        row = start
        while row < stop:
            piece = self.pieces[index]
            end = min(stop, piece.dst_row + piece.num_rows)
            first = piece.src_row + row - piece.dst_row
            self._read(piece.src_name, first, end - row, out[(row - start) * step : (end - start) * step], scratch)
            row, index = end, index + 1

    def _read(self, name: str, first: int, count: int, out: memoryview, scratch: Scratch) -> None:
        source = self.reader.tensors[name]
        if source.dtype == self.tensor.dtype:
            self.reader.read_rows(name, first, first + count, out)
            return
        source_step, step = self.elements * ITEM_SIZES[source.dtype], self.elements * self.item_size
        rows = max(1, _SCRATCH_BYTES // source_step)
        for low in range(0, count, rows):
            high = min(low + rows, count)
            view = scratch.view((high - low) * source_step)
            self.reader.read_rows(name, first + low, first + high, view)
            convert(view, source.dtype, out[low * step : high * step], self.tensor.dtype)


class PlannedReader:
    """The tensors of a plan, read by rows as `copy` would write them. As thread-safe as the reader it reads from.

    Raises MappingError where the plan does not fit the tensors.
    """

    def __init__(self, tensors: Iterable[CopyTensor], reader: RowReader) -> None:
        self._sources = {tensor.name: PlannedTensor(tensor, reader) for tensor in tensors}
        self.tensors = {name: source.tensor.spec for name, source in self._sources.items()}

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        view = as_bytes(out)
        check_rows(name, self.tensors[name], start, stop, len(view))
        self._sources[name].fill(start, stop, view, Scratch())
