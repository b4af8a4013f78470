"""What every room that moves tensor bytes shares: dtypes by their safetensors names, rows, exact reads and writes.

A *row* is everything behind axis 0 of a tensor; a 0-d tensor is one row of one element. All data moves as rows, in
plain reads and writes on file descriptors: the pages of a memory map would count as this process's memory.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from bridge.errors import CheckpointError

# Bytes per element of the dtypes that can be copied. Sub-byte and complex ones occur in no Gemma 4 checkpoint.
ITEM_SIZES: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# Linux writes and reads at most 0x7ffff000 bytes a call; a smaller bound keeps an interrupt prompt as well.
_IO_BYTES = 64 << 20


class TensorLike(Protocol):
    """A tensor as a reader or a plan describes it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class RowReader(Protocol):
    """Tensors on a disk, read by rows: `HfFolder`, `DistReader`."""

    @property
    def tensors(self) -> Mapping[str, TensorLike]: ...

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """Fill `out` (a writable contiguous buffer of exactly that many bytes) with rows [start, stop)."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written. `dtype` is a safetensors name such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class RowChunk:
    """Rows [start, stop) of one tensor: what one worker moves at a time."""

    name: str
    start: int
    stop: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """One file of a checkpoint that is being written, and the chunks that fill it. It is finished or not at all."""

    file: str
    nbytes: int
    chunks: tuple[RowChunk, ...]


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape."""
    return shape[0] if shape else 1


def row_elements(shape: tuple[int, ...]) -> int:
    """Elements of one row."""
    return math.prod(shape[1:])


def row_bytes(tensor: TensorLike) -> int:
    """Bytes of one row."""
    return row_elements(tensor.shape) * ITEM_SIZES[tensor.dtype]


def split_rows(spec: TensorSpec, chunk_bytes: int) -> list[RowChunk]:
    """Cut a tensor into chunks of whole rows, at most `chunk_bytes` each (or one row, where a row is larger)."""
    rows, size = num_rows(spec.shape), row_bytes(spec)
    if rows * size == 0:
        return [RowChunk(spec.name, 0, rows, 0)]
    step = max(1, chunk_bytes // size)
    return [
        RowChunk(spec.name, start, min(start + step, rows), (min(start + step, rows) - start) * size)
        for start in range(0, rows, step)
    ]


def check_specs(specs: Iterable[TensorSpec], where: str) -> dict[str, TensorSpec]:
    """The tensors by name. Raises CheckpointError on a duplicate, a bad shape or a dtype that cannot be copied."""
    by_name: dict[str, TensorSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise CheckpointError(f"{where}: tensor {printable(spec.name)} is to be written twice")
        if spec.dtype not in ITEM_SIZES:
            raise CheckpointError(
                f"{where}: tensor {printable(spec.name)} has the dtype {spec.dtype}, which is unknown"
            )
        if any(size < 0 for size in spec.shape):
            raise CheckpointError(f"{where}: tensor {printable(spec.name)} has the shape {spec.shape}")
        by_name[spec.name] = spec
    return by_name


def check_rows(name: str, tensor: TensorLike, start: int, stop: int, have: int) -> None:
    """Raise CheckpointError unless rows [start, stop) exist and take exactly `have` bytes."""
    rows = num_rows(tensor.shape)
    if not 0 <= start <= stop <= rows:
        raise CheckpointError(f"tensor {printable(name)}: rows {start} to {stop} asked of {rows}")
    need = (stop - start) * row_bytes(tensor)
    if have != need:
        raise CheckpointError(
            f"tensor {printable(name)}: rows {start} to {stop} take {need} bytes, the buffer has {have}"
        )


def printable(name: object) -> str:
    """A name from a file as one short printable line, for messages."""
    text = str(name) if isinstance(name, str | Path) else type(name).__name__
    if not text.isprintable() or not text:
        text = ascii(text)
    return text if len(text) <= 160 else text[:157] + "..."


def as_bytes(buffer: Any) -> memoryview:
    """A contiguous buffer (numpy array of any dtype, bytes, memoryview) as flat bytes, without a copy."""
    view = memoryview(buffer)
    # cast() refuses views with a zero in the shape, and there is nothing in them anyway.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def pread_into(fd: int, out: memoryview, offset: int, path: Path) -> None:
    """Fill `out` from `offset` of the file. Raises CheckpointError when the file ends early or cannot be read."""
    done = 0
    while done < len(out):
        try:
            got = os.preadv(fd, [out[done : done + _IO_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{printable(path)}: cannot be read ({error.strerror})") from None
        if got == 0:
            raise CheckpointError(
                f"{printable(path)}: ends at byte {offset + done}, before the data that it should hold"
            )
        done += got


def pread_bytes(fd: int, nbytes: int, offset: int, path: Path) -> bytes:
    """`nbytes` from `offset`, as new bytes."""
    out = bytearray(nbytes)
    pread_into(fd, memoryview(out), offset, path)
    return bytes(out)


def pwrite_all(fd: int, parts: Iterable[memoryview | bytes], offset: int, path: Path) -> None:
    """Write the parts behind each other from `offset`. Raises CheckpointError (a full disk is named as such)."""
    for part in parts:
        view, done = memoryview(part), 0
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done : done + _IO_BYTES], offset + done)
            except OSError as error:
                raise write_error(path, error) from None
        offset += done


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The one-line error for a failed write; `__cause__` keeps the errno for those who care about a full disk."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = "the disk is full" if full else f"cannot be written ({error.strerror})"
    failure = CheckpointError(f"{printable(path)}: {text}")
    failure.__cause__ = error
    return failure


def open_regular(path: Path) -> tuple[int, int]:
    """(file descriptor, size) of a regular file. Raises CheckpointError: absent, a device, a pipe, no permission."""
    try:
        # O_NONBLOCK: opening a planted pipe must not wait for a writer that never comes.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{printable(path)}: not found") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{printable(path)}: cannot be opened ({printable(str(error))})") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise CheckpointError(f"{printable(path)}: not a regular file")
    return fd, info.st_size


def inside(folder: Path, relative: str) -> Path:
    """The path of a file that another file of the folder names.

    Raises CheckpointError when the name is absolute, contains `..` or leads out of the folder through a link that
    `check_link` does not allow.
    """
    pure = PurePosixPath(relative)
    if not relative or "\0" in relative or "\\" in relative or pure.is_absolute() or ".." in pure.parts:
        raise CheckpointError(
            f"{printable(folder)}: names the file {printable(relative)}, which is not inside the folder"
        )
    path = folder / relative
    check_link(folder, path)
    return path


def check_link(folder: Path, path: Path) -> None:
    """Raise CheckpointError when a link makes `path` lead out of `folder`, unless that is what it is for.

    Allowed are the blobs of the Hugging Face cache, of which its snapshots are made, and a file of the same name in
    another model folder (one with a config.json): a folder of links into another. Nothing else, since every file of a
    folder is carried along: a link planted in a download must not take a stranger's file with it.
    """
    try:
        root, target = folder.resolve(), path.resolve()
        if target.is_relative_to(root):
            return
        if root.parent.name == "snapshots" and target.is_relative_to((root.parent.parent / "blobs").resolve()):
            return
        if path.is_symlink():
            there = path.parent / path.readlink()
            if there.name == path.name and (there.parent / "config.json").is_file():
                check_link(there.parent, there)
                return
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{printable(path)}: cannot be resolved ({printable(str(error))})") from None
    raise CheckpointError(
        f"{printable(path)}: a link that leads out of the folder, to {printable(target)}, which is no file of the "
        "same name in another model folder"
    )


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises CheckpointError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise write_error(folder, error) from None
        # Some file systems sync no folder by itself (CIFS, FUSE): then everything that the machine has not written yet.
        os.sync()
    finally:
        os.close(fd)
