"""The one streaming copy: import, export and the comparison of a round trip are plans of row blocks, carried out here.

A plan says for every destination tensor which rows of which source tensors it consists of. Chunks are moved by a few
threads with one reused buffer each, so memory depends on the chunk and on nothing else.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from bridge.convert.dtypes import can_convert, convert
from bridge.errors import MappingError
from bridge.hf.tensors import (
    ITEM_SIZES,
    Chunk,
    RowReader,
    TensorSpec,
    Unit,
    as_bytes,
    check_rows,
    num_rows,
    row_elements,
    shown,
    split_rows,
)

CHUNK_BYTES = 8 << 20
_SCRATCH_BYTES = 4 << 20
# A large file goes to the disk while it is written: left to its end, nothing would overlap with the last gigabytes.
_FLUSH_BYTES = 512 << 20
Progress = Callable[[int, int, str], None]


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


class RowWriter(Protocol):
    """A checkpoint that is written file by file: `HfWriter`, `DistWriter`."""

    def units(self, chunk_bytes: int) -> Sequence[Unit]: ...

    def write_rows(self, name: str, start: int, array: Any, crc: int | None = None) -> None: ...

    def check_unit(self, unit: Unit, crcs: Sequence[int], scratch: memoryview) -> bool: ...

    def finish_unit(self, unit: Unit, *, sync: bool = True) -> None: ...

    def flush(self, unit: Unit) -> None: ...


class UnitJournal(Protocol):
    """Where finished files are recorded, so that an interrupted copy can go on: `bridge.convert.atomic.Journal`."""

    @property
    def finished(self) -> Mapping[str, tuple[int, ...]]: ...

    def record(self, file: str, crcs: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class CopyResult:
    """What a copy did. `checksums`: the CRC32 of every destination tensor's bytes. Sizes in bytes of tensor data."""

    bytes_total: int
    bytes_resumed: int
    files_resumed: int
    checksums: dict[str, int]


def plan_digest(tensors: Iterable[CopyTensor], *options: object) -> str:
    """A digest of a plan and of whatever else decides the result, to recognise an interrupted copy by."""
    digest = hashlib.blake2b(digest_size=20)
    for item in (*options, *tensors):
        digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()


def copy(
    tensors: Sequence[CopyTensor],
    reader: RowReader,
    writer: RowWriter,
    *,
    workers: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
    journal: UnitJournal | None = None,
    sync: bool = True,
) -> CopyResult:
    """Write every tensor of the plan, file by file.

    Files that `journal` names are checked and kept. `progress(bytes_done, bytes_total, tensor)` is called in the
    calling thread. `sync`: make each file durable as it is finished. `writer.finish()` is left to the caller. An error
    or an interrupt stops all threads before it propagates. Raises MappingError (the plan does not fit the tensors) and
    CheckpointError.
    """
    plan = {tensor.name: _Source(tensor, reader) for tensor in tensors}
    units = list(writer.units(chunk_bytes))
    planned = {chunk.name for unit in units for chunk in unit.chunks}
    for name in sorted(planned ^ plan.keys()):
        raise MappingError(
            f"tensor {shown(name)} is {'not planned' if name in planned else 'planned'} but not both ways"
        )
    total = sum(chunk.nbytes for unit in units for chunk in unit.chunks)
    largest = max((chunk.nbytes for unit in units for chunk in unit.chunks), default=0)
    crcs: dict[tuple[str, int], int] = {}
    done = 0

    # Files of an earlier run first.
    kept: set[str] = set()
    known = {} if journal is None else journal.finished
    old = [unit for unit in units if len(known.get(unit.file, ())) == len(unit.chunks)]

    def make_checker() -> Callable[[Unit], tuple[Unit, bool]]:
        scratch = memoryview(np.empty(largest, dtype=np.uint8))
        return lambda unit: (unit, writer.check_unit(unit, known[unit.file], scratch))

    for unit, intact in parallel(old, make_checker, workers):
        if intact:
            kept.add(unit.file)
            crcs |= {(c.name, c.start): crc for c, crc in zip(unit.chunks, known[unit.file], strict=True)}
            done += sum(chunk.nbytes for chunk in unit.chunks)
            if progress is not None:
                progress(done, total, unit.file)
    resumed = done

    def make_mover() -> Callable[[tuple[Unit, Chunk]], tuple[Unit, Chunk, int]]:
        buffer = memoryview(np.empty(largest, dtype=np.uint8))
        scratch = _Scratch()

        def move(task: tuple[Unit, Chunk]) -> tuple[Unit, Chunk, int]:
            unit, chunk = task
            view = buffer[: chunk.nbytes]
            plan[chunk.name].fill(chunk.start, chunk.stop, view, scratch)
            crc = zlib.crc32(view)
            writer.write_rows(chunk.name, chunk.start, view, crc)
            return unit, chunk, crc

        return move

    waiting = {unit.file: len(unit.chunks) for unit in units if unit.file not in kept}
    tasks = [(unit, chunk) for unit in units if unit.file in waiting for chunk in unit.chunks]
    unwritten = 0
    for unit, chunk, crc in parallel(tasks, make_mover, workers):
        crcs[chunk.name, chunk.start] = crc
        done += chunk.nbytes
        if progress is not None:
            progress(done, total, chunk.name)
        waiting[unit.file] -= 1
        unwritten += chunk.nbytes
        if sync and unwritten >= _FLUSH_BYTES and waiting[unit.file]:
            writer.flush(unit)
            unwritten = 0
        if waiting[unit.file] == 0:
            unwritten = 0
            # The other threads go on with the next file meanwhile.
            writer.finish_unit(unit, sync=sync)
            if journal is not None:
                journal.record(unit.file, [crcs[c.name, c.start] for c in unit.chunks])
    return CopyResult(total, resumed, len(kept), _join_checksums(units, crcs))


def compare(
    tensors: Sequence[CopyTensor],
    source: RowReader,
    target: RowReader,
    *,
    workers: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Iterator[tuple[str, bool, str]]:
    """Compare what the plan would write with what `target` holds: (tensor, equal, what differs) for each, in order.

    Bytes are compared, so NaNs and zeros of either sign count. Raises MappingError and CheckpointError.
    """
    plan = {tensor.name: _Source(tensor, source) for tensor in tensors}
    details: dict[str, str] = {}
    tasks: list[Chunk] = []
    waiting: dict[str, int] = {}
    for tensor in tensors:
        found = target.tensors.get(tensor.name)
        if found is None:
            details[tensor.name] = "absent"
        elif (found.dtype, tuple(found.shape)) != (tensor.dtype, tensor.shape):
            details[tensor.name] = f"{found.dtype} {tuple(found.shape)}, expected {tensor.dtype} {tensor.shape}"
        chunks = [] if tensor.name in details else split_rows(tensor.spec, chunk_bytes)
        tasks.extend(chunks)
        waiting[tensor.name] = len(chunks)
    total, largest = sum(c.nbytes for c in tasks), max((c.nbytes for c in tasks), default=0)

    def make_comparer() -> Callable[[Chunk], tuple[Chunk, str]]:
        ours, theirs = np.empty(largest, dtype=np.uint8), np.empty(largest, dtype=np.uint8)
        scratch = _Scratch()

        def work(chunk: Chunk) -> tuple[Chunk, str]:
            left, right = ours[: chunk.nbytes], theirs[: chunk.nbytes]
            plan[chunk.name].fill(chunk.start, chunk.stop, memoryview(left), scratch)
            target.read_rows(chunk.name, chunk.start, chunk.stop, right)
            return chunk, _difference(left, right, chunk, plan[chunk.name].item_size)

        return work

    done, order = 0, [tensor.name for tensor in tensors]
    reported = 0
    for chunk, detail in parallel(tasks, make_comparer, workers):
        done += chunk.nbytes
        if progress is not None:
            progress(done, total, chunk.name)
        if detail:
            details.setdefault(chunk.name, detail)
        waiting[chunk.name] -= 1
        while reported < len(order) and waiting[order[reported]] == 0:
            name = order[reported]
            yield name, name not in details, details.get(name, "")
            reported += 1
    for name in order[reported:]:
        yield name, name not in details, details.get(name, "")


def checksums(
    reader: RowReader,
    names: Iterable[str] | None = None,
    *,
    workers: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> dict[str, int]:
    """The CRC32 of the bytes of each tensor: the same numbers as `CopyResult.checksums`. Raises CheckpointError."""
    chosen = list(reader.tensors) if names is None else list(names)
    specs = [TensorSpec(name, reader.tensors[name].dtype, tuple(reader.tensors[name].shape)) for name in chosen]
    units = [Unit(spec.name, spec.nbytes, tuple(split_rows(spec, chunk_bytes))) for spec in specs]
    tasks = [chunk for unit in units for chunk in unit.chunks]
    total, largest = sum(c.nbytes for c in tasks), max((c.nbytes for c in tasks), default=0)

    def make_worker() -> Callable[[Chunk], tuple[Chunk, int]]:
        buffer = memoryview(np.empty(largest, dtype=np.uint8))

        def work(chunk: Chunk) -> tuple[Chunk, int]:
            view = buffer[: chunk.nbytes]
            reader.read_rows(chunk.name, chunk.start, chunk.stop, view)
            return chunk, zlib.crc32(view)

        return work

    crcs, done = {}, 0
    for chunk, crc in parallel(tasks, make_worker, workers):
        crcs[chunk.name, chunk.start] = crc
        done += chunk.nbytes
        if progress is not None:
            progress(done, total, chunk.name)
    return _join_checksums(units, crcs)


def parallel[T, R](tasks: Sequence[T], make_worker: Callable[[], Callable[[T], R]], workers: int) -> Iterator[R]:
    """Run the tasks in `workers` threads, started in order; yields results as they come, in the calling thread.

    Each thread makes its own worker, and with it its buffers. The first error, an interrupt in the calling thread, or
    closing the iterator stops all threads, each after the task that it is at.
    """
    results: queue.SimpleQueue[tuple[R | None, BaseException | None, bool]] = queue.SimpleQueue()
    lock, stop, pending = threading.Lock(), threading.Event(), iter(tasks)

    def run() -> None:
        try:
            work = make_worker()
            while not stop.is_set():
                with lock:
                    task = next(pending, None)
                if task is None:
                    break
                results.put((work(task), None, False))
        except BaseException as error:
            stop.set()
            results.put((None, error, False))
        finally:
            results.put((None, None, True))

    count = max(1, min(workers, len(tasks))) if tasks else 0
    threads = [threading.Thread(target=run, name=f"copy-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        running = count
        while running:
            result, error, ended = results.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            else:
                yield result  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


class _Scratch:
    """A thread's buffer for source rows that change their dtype on the way."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def view(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(nbytes, dtype=np.uint8)
        return memoryview(self._buffer)[:nbytes]


class _Source:
    """The rows of one destination tensor, read from its pieces."""

    def __init__(self, tensor: CopyTensor, reader: RowReader) -> None:
        self.tensor, self.reader = tensor, reader
        self.item_size = ITEM_SIZES.get(tensor.dtype, 0)
        if not self.item_size:
            raise MappingError(f"tensor {shown(tensor.name)}: dtype {shown(tensor.dtype)} is not supported")
        self.elements = row_elements(tensor.shape)
        self.pieces = self._checked_pieces()
        self._starts = [piece.dst_row for piece in self.pieces]

    def _checked_pieces(self) -> list[Piece]:
        """The pieces in order, neighbours joined. Raises MappingError unless they cover the tensor exactly once."""
        where = f"tensor {shown(self.tensor.name)}"
        merged: list[Piece] = []
        end = 0
        for piece in sorted(self.tensor.pieces, key=lambda piece: piece.dst_row):
            source = self.reader.tensors.get(piece.src_name)
            if source is None:
                raise MappingError(f"{where} is made of {shown(piece.src_name)}, which the source does not have")
            if piece.num_rows <= 0 or piece.src_row < 0 or piece.src_row + piece.num_rows > num_rows(source.shape):
                raise MappingError(
                    f"{where} takes rows {piece.src_row} to {piece.src_row + piece.num_rows} of "
                    f"{shown(piece.src_name)}, which has {num_rows(source.shape)}"
                )
            if row_elements(source.shape) != self.elements:
                raise MappingError(
                    f"{where} {self.tensor.shape} takes rows of {shown(piece.src_name)} {tuple(source.shape)}: "
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

    def fill(self, start: int, stop: int, out: memoryview, scratch: _Scratch) -> None:
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

    def _read(self, name: str, first: int, count: int, out: memoryview, scratch: _Scratch) -> None:
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
        self._sources = {tensor.name: _Source(tensor, reader) for tensor in tensors}
        self.tensors = {name: source.tensor.spec for name, source in self._sources.items()}

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        view = as_bytes(out)
        check_rows(name, self.tensors[name], start, stop, len(view))
        self._sources[name].fill(start, stop, view, _Scratch())


def _difference(
    ours: np.ndarray[Any, np.dtype[np.uint8]], theirs: np.ndarray[Any, np.dtype[np.uint8]], chunk: Chunk, item: int
) -> str:
    """ "" when the bytes are equal, else where they first differ."""
    wide = len(ours) & ~7
    if np.array_equal(ours[:wide].view(np.uint64), theirs[:wide].view(np.uint64)) and np.array_equal(
        ours[wide:], theirs[wide:]
    ):
        return ""
    different = (ours != theirs).reshape(-1, item).any(axis=1)
    per_row = len(different) // max(chunk.stop - chunk.start, 1)
    row, column = divmod(int(different.argmax()), max(per_row, 1))
    return f"row {chunk.start + row}, element {column} is the first of {int(different.sum())} that differ near there"


_POLY = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """a * b modulo the CRC32 polynomial, bits reflected."""
    product, bit = 0, 1 << 31
    while True:
        if a & bit:
            product ^= b
            if not a & (bit - 1):
                return product
        bit >>= 1
        b = (b >> 1) ^ (_POLY if b & 1 else 0)


@lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) modulo the polynomial."""
    result, square, bits = 1 << 31, 1 << 30, 8 * nbytes
    while bits:
        if bits & 1:
            result = _multiply(square, result)
        square, bits = _multiply(square, square), bits >> 1
    return result


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC32 of two runs of bytes behind each other, from theirs and the length of the second."""
    return (_multiply(_power(second_bytes), first) if first else 0) ^ second


def _join_checksums(units: Iterable[Unit], crcs: Mapping[tuple[str, int], int]) -> dict[str, int]:
    joined: dict[str, int] = {}
    for chunk in sorted((c for unit in units for c in unit.chunks), key=lambda c: (c.name, c.start)):
        joined[chunk.name] = combine_crc32(joined.get(chunk.name, 0), crcs[chunk.name, chunk.start], chunk.nbytes)
    return joined
