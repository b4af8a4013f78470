"""Writing safetensors shards by rows, in any order: every position is planned before the first byte."""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.close_on_exit import CloseOnExit
from bridge.errors import CheckpointError, UsageError
from bridge.hf.descriptors import Descriptors
from bridge.hf.folder import INDEX_FILE, SINGLE_FILE
from bridge.hf.tensors import (
    ITEM_SIZES,
    TensorSpec,
    Unit,
    as_bytes,
    check_rows,
    check_specs,
    fsync_folder,
    pread_bytes,
    pread_into,
    printable,
    pwrite_all,
    row_bytes,
    split_rows,
    write_error,
)

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a plain number. Raises UsageError."""
    if isinstance(text, int):
        text = str(text)
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{printable(text)} is not a size; write it as 5GB, 500MB or 2GiB")
    number, letter, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
    if size <= 0:
        raise UsageError(f"{printable(text)} is not a size above zero")
    return size


class RowLedger:
    """Which rows were written: that every row is written once is checked when a writer finishes. Thread-safe."""

    def __init__(self, specs: Mapping[str, TensorSpec], folder: Path) -> None:
        self._specs, self._folder = specs, folder
        self._lock = threading.Lock()
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in specs}

    def add(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            self._ranges[name].append((start, stop))

    def check(self) -> None:
        """Raise CheckpointError that names a tensor of which rows are missing or were written twice."""
        for name, ranges in self._ranges.items():
            end, spec = 0, self._specs[name]
            if spec.nbytes == 0:
                continue
            for start, stop in sorted(ranges):
                if start != end:
                    what = "were not written" if start > end else "were written twice"
                    low, high = sorted((start, end))
                    raise CheckpointError(
                        f"{printable(self._folder)}: rows {low} to {high} of {printable(name)} {what}"
                    )
                end = stop
            rows = spec.shape[0] if spec.shape else 1
            if end != rows:
                raise CheckpointError(
                    f"{printable(self._folder)}: rows {end} to {rows} of {printable(name)} were not written"
                )


class UnitFiles(CloseOnExit):
    """Files of a known size that are written in any order, begun at their first write. Thread-safe."""

    def __init__(self, folder: str | Path, tensors: Iterable[TensorSpec]) -> None:
        self.folder = Path(folder)
        self.specs = check_specs(tensors, printable(self.folder))
        self._ledger = RowLedger(self.specs, self.folder)
        self._sizes: dict[str, int] = {}
        self._begun: set[str] = set()
        self._finished: set[str] = set()
        self._files = Descriptors(self._open)

    def _begin(self, fd: int, file: str) -> None:
        """What a file gets when it is begun."""

    def _holds(self, fd: int, unit: Unit, crcs: Sequence[int], scratch: memoryview) -> bool:
        """Whether an open file of the right size is complete. Raises CheckpointError, ValueError, OverflowError."""
        raise NotImplementedError

    def check_unit(self, unit: Unit, crcs: Sequence[int], scratch: memoryview) -> bool:
        """Whether the file on disk is complete: its size, what frames its chunks, and the CRC32 of every chunk.

        If so its rows count as written. `scratch` must hold the largest chunk.
        """
        path = self.folder / unit.file
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_size != unit.nbytes or not self._holds(fd, unit, crcs, scratch):
                return False
        except (CheckpointError, ValueError, OverflowError):
            return False
        finally:
            os.close(fd)
        for chunk in unit.chunks:
            self._ledger.add(chunk.name, chunk.start, chunk.stop)
        self._finished.add(unit.file)
        return True

    def _open(self, path: Path) -> int:
        """Begin a file, or open one again that was begun."""
        file = path.name
        again = file in self._begun
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if again else os.O_CREAT)
            fd = os.open(path, flags, 0o666)
            try:
                if not again:
                    os.ftruncate(fd, self._sizes[file])
                    self._begin(fd, file)
                    self._begun.add(file)
            except BaseException:
                os.close(fd)
                raise
        except FileNotFoundError:
            if again:
                raise CheckpointError(f"{printable(path)}: vanished while it was being written") from None
            raise CheckpointError(f"{printable(path)}: cannot be written (its folder vanished)") from None
        except OSError as error:
            raise write_error(path, error) from None
        return fd

    def _pwrite(self, file: str, parts: Iterable[memoryview | bytes], offset: int) -> None:
        path = self.folder / file
        with self._files.use(path) as fd:
            pwrite_all(fd, parts, offset, path)

    def flush(self, unit: Unit) -> None:
        """Have what is written of a file so far brought to the disk, and out of memory. Raises CheckpointError."""
        if unit.file in self._begun:
            self._sync(unit.file, os.fdatasync)

    def finish_unit(self, unit: Unit, *, sync: bool = True) -> None:
        """Make one file durable and close it. A file of tensors without elements is created here."""
        if sync:
            self._sync(unit.file, os.fsync)
        else:
            with self._files.use(self.folder / unit.file):
                pass
        self._files.drop(self.folder / unit.file)
        self._finished.add(unit.file)

    def _sync(self, file: str, how: Callable[[int], None]) -> None:
        path = self.folder / file
        with self._files.use(path) as fd:
            try:
                how(fd)
                _release(fd)
            except OSError as error:
                raise write_error(path, error) from None

    def _finish_files(self) -> None:
        """Make durable what is not yet, and hold every file against its size: one may have vanished since."""
        for file, size in self._sizes.items():
            path = self.folder / file
            if file not in self._finished:
                self.finish_unit(Unit(file, size, ()))
            have = path.lstat().st_size if path.is_file() and not path.is_symlink() else None
            if have != size:
                what = "vanished" if have is None else f"has {have} bytes, not {size}"
                raise CheckpointError(f"{printable(path)}: {what}, after it was written")

    def close(self) -> None:
        """Close the files without finishing. Safe to call twice, and after finish()."""
        self._files.close()


def _release(fd: int) -> None:
    """Let the system reuse the memory that holds a file's pages, once they are on the disk.

    A checkpoint is larger than what a machine has to spare: finding new pages for every gigabyte costs more than
    writing it, and pushes out what other programs hold.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class HfWriter(UnitFiles):
    """Writes `model.safetensors`, or shards and an index, into an existing folder. Thread-safe.

    Shards are cut as transformers cuts them: tensors in the given order, a new shard where the next tensor would pass
    `max_shard_size` bytes. Within a shard the wider dtypes come first, so that every tensor is aligned to its dtype.
    Nothing is written before the first `write_rows`, and a file that exists is written over in place. `single` is the
    name of the file where there are no shards.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Sequence[TensorSpec],
        max_shard_size: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        *,
        single: str = SINGLE_FILE,
    ) -> None:
        super().__init__(folder, tensors)
        self._single = single
        if not self.specs:
            raise CheckpointError(f"{printable(self.folder)}: no tensors to write")
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._shards: dict[str, list[TensorSpec]] = {}
        self._plan(list(tensors), max_shard_size, {"format": "pt"} if metadata is None else dict(metadata))

    def _plan(self, tensors: list[TensorSpec], max_shard_size: int, metadata: dict[str, str]) -> None:
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in tensors:
            if shards[-1] and filled + spec.nbytes > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += spec.nbytes
        for number, shard in enumerate(shards, 1):
            file = self._single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard.sort(key=lambda spec: -ITEM_SIZES[spec.dtype])
            header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
            offset = 0
            for spec in shard:
                end = offset + spec.nbytes
                header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            self._headers[file] = len(text).to_bytes(8, "little") + text
            base = len(self._headers[file])
            for spec in shard:
                self._places[spec.name] = (file, base + header[spec.name]["data_offsets"][0])
            self._shards[file] = shard
            self._sizes[file] = base + offset

    def units(self, chunk_bytes: int) -> tuple[Unit, ...]:
        """The files, and the chunks of at most `chunk_bytes` that fill each."""
        return tuple(
            Unit(file, self._sizes[file], tuple(c for spec in shard for c in split_rows(spec, chunk_bytes)))
            for file, shard in self._shards.items()
        )

    def write_rows(self, name: str, start: int, array: Any, crc: int | None = None) -> None:
        """Write rows from `start` on; their number follows from the bytes of `array` (contiguous, any dtype).

        `crc` (the CRC32 of the bytes, for formats that store it) is not needed here. Raises CheckpointError.
        """
        del crc
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{printable(self.folder)}: no tensor {printable(name)} was planned")
        view, size = as_bytes(array), row_bytes(spec)
        stop = start + (len(view) // size if size else 0)
        check_rows(name, spec, start, stop, len(view))
        file, offset = self._places[name]
        self._pwrite(file, [view], offset + start * size)
        self._ledger.add(name, start, stop)

    def _begin(self, fd: int, file: str) -> None:
        pwrite_all(fd, [self._headers[file]], 0, self.folder / file)

    def _holds(self, fd: int, unit: Unit, crcs: Sequence[int], scratch: memoryview) -> bool:
        path, header = self.folder / unit.file, self._headers[unit.file]
        if pread_bytes(fd, len(header), 0, path) != header:
            return False
        for chunk, crc in zip(unit.chunks, crcs, strict=True):
            view = scratch[: chunk.nbytes]
            offset = self._places[chunk.name][1] + chunk.start * row_bytes(self.specs[chunk.name])
            pread_into(fd, view, offset, path)
            if zlib.crc32(view) != crc:
                return False
        return True

    def finish(self) -> None:
        """Check that every byte was written once, write the index, make all of it durable. Raises CheckpointError."""
        self._ledger.check()
        self._finish_files()
        if len(self._shards) > 1:
            write_text(self.folder / INDEX_FILE, json.dumps(self._index(), indent=2, sort_keys=True) + "\n")
        fsync_folder(self.folder)

    def _index(self) -> dict[str, Any]:
        total = sum(spec.nbytes for spec in self.specs.values())
        return {
            "metadata": {"total_size": total},
            "weight_map": {name: file for name, (file, _) in self._places.items()},
        }


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file and make it durable. Raises CheckpointError."""
    data = text.encode() if isinstance(text, str) else text
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from None
