"""The one streaming copy: import, export and the comparison of a round trip are plans of row blocks, carried out here.

Chunks of a plan (`bridge.convert.pieces`) are moved by a few threads with one reused buffer each, so memory depends on
the chunk and on nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bridge.convert.pieces import CopyTensor, PlannedTensor, Scratch
from bridge.convert.threads import parallel
from bridge.errors import MappingError
from bridge.hf.tensors import RowChunk, RowReader, Unit, printable, split_rows

CHUNK_BYTES = 8 << 20
# A large file goes to the disk while it is written: left to its end, nothing would overlap with the last gigabytes,
# and the pages of all of it would have to be found in memory.
_FLUSH_BYTES = 512 << 20
Progress = Callable[[int, int, str], None]


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
    """What a copy did. Sizes in bytes of tensor data."""

    bytes_total: int
    bytes_resumed: int
    files_resumed: int


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
    plan = {tensor.name: PlannedTensor(tensor, reader) for tensor in tensors}
    units = list(writer.units(chunk_bytes))
    _check_planned(units, plan)
    total = sum(chunk.nbytes for unit in units for chunk in unit.chunks)
    largest = max((chunk.nbytes for unit in units for chunk in unit.chunks), default=0)
    crcs: dict[tuple[str, int], int] = {}
    done = 0

    # Files of an earlier run first.
    finished: set[str] = set()
    known = {} if journal is None else journal.finished
    old = [unit for unit in units if len(known.get(unit.file, ())) == len(unit.chunks)]
    for unit in _intact(old, known, writer, largest, workers):
        finished.add(unit.file)
        crcs |= {(c.name, c.start): crc for c, crc in zip(unit.chunks, known[unit.file], strict=True)}
        done += sum(chunk.nbytes for chunk in unit.chunks)
        if progress is not None:
            progress(done, total, unit.file)
    resumed = done

    waiting = {unit.file: len(unit.chunks) for unit in units if unit.file not in finished}
    tasks = [(unit, chunk) for unit in units if unit.file in waiting for chunk in unit.chunks]
    unwritten = 0
    for unit, chunk, crc in parallel(tasks, _mover(plan, writer, largest), workers):
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
    return CopyResult(total, resumed, len(finished))


def _check_planned(units: Sequence[Unit], plan: Mapping[str, PlannedTensor]) -> None:
    """Raise MappingError unless the writer expects the tensors of the plan and no others."""
    expected = {chunk.name for unit in units for chunk in unit.chunks}
    for name in sorted(expected ^ plan.keys()):
        raise MappingError(
            f"tensor {printable(name)} is {'not planned' if name in expected else 'planned'} but not both ways"
        )


def _mover(
    plan: Mapping[str, PlannedTensor], writer: RowWriter, largest: int
) -> Callable[[], Callable[[tuple[Unit, RowChunk]], tuple[Unit, RowChunk, int]]]:
    """Makes, for each thread, what moves a chunk (of at most `largest` bytes) and says its CRC32."""

    def make() -> Callable[[tuple[Unit, RowChunk]], tuple[Unit, RowChunk, int]]:
        buffer = memoryview(np.empty(largest, dtype=np.uint8))
        scratch = Scratch()

        def move(task: tuple[Unit, RowChunk]) -> tuple[Unit, RowChunk, int]:
            unit, chunk = task
            view = buffer[: chunk.nbytes]
            plan[chunk.name].fill(chunk.start, chunk.stop, view, scratch)
            crc = zlib.crc32(view)
            writer.write_rows(chunk.name, chunk.start, view, crc)
            return unit, chunk, crc

        return move

    return make


def _intact(
    units: Sequence[Unit], known: Mapping[str, tuple[int, ...]], writer: RowWriter, largest: int, workers: int
) -> Iterator[Unit]:
    """Those of the files of an earlier run that still hold what their checksums say."""

    def make_checker() -> Callable[[Unit], tuple[Unit, bool]]:
        scratch = memoryview(np.empty(largest, dtype=np.uint8))
        return lambda unit: (unit, writer.check_unit(unit, known[unit.file], scratch))

    for unit, intact in parallel(units, make_checker, workers):
        if intact:
            yield unit


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
    plan = {tensor.name: PlannedTensor(tensor, source) for tensor in tensors}
    details: dict[str, str] = {}
    tasks: list[RowChunk] = []
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

    def make_comparer() -> Callable[[RowChunk], tuple[RowChunk, str]]:
        ours, theirs = np.empty(largest, dtype=np.uint8), np.empty(largest, dtype=np.uint8)
        scratch = Scratch()

        def work(chunk: RowChunk) -> tuple[RowChunk, str]:
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


def _difference(
    ours: np.ndarray[Any, np.dtype[np.uint8]], theirs: np.ndarray[Any, np.dtype[np.uint8]], chunk: RowChunk, item: int
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
