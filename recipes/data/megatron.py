"""Tokens as Megatron keeps them, PREFIX.bin and PREFIX.idx, read and written by Megatron-Core's own classes.

A sequence of the index is a record of its own, so that packed rows keep its boundaries. The tokens stay in the file,
which is mapped: what is held is the index of a file, 20 bytes a sequence, and what is worked on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import DataError, UsageError
from recipes.data.formats import MEGATRON
from recipes.data.record_batches import Record, RecordBatch
from recipes.data.sample import Where

_SUFFIXES = (".bin", ".idx")
# A batch of records ends with whichever comes first.
_SEQUENCES, _TOKENS = 1024, 1 << 18
# Of the tokens themselves, what is read to know the file again: so much at either end.
_READ = 1 << 20


def prefix_of(name: str) -> str | None:
    """The prefix that a name is, or that one of its two files has; None where it is something else."""
    prefix = name[: -len(_SUFFIXES[0])] if name.endswith(_SUFFIXES) else name
    return prefix if prefix and all(Path(prefix + suffix).is_file() for suffix in _SUFFIXES) else None


class MegatronFile:
    """The two files of a prefix, as a `RecordSource`; a record's line is the sequence, from 1."""

    def __init__(self, prefix: str) -> None:
        self.name, self.root, self.share = prefix, None, 0.0

    def size(self) -> int:
        """Of the tokens, in bytes."""
        return _size(f"{self.name}.bin")

    def fingerprint(self) -> str:
        """Of the index, and of the size, the beginning and the end of the tokens. Raises DataError."""
        digest = hashlib.sha256(str(self.size()).encode())
        try:
            with Path(f"{self.name}.idx").open("rb") as index:
                while block := index.read(_READ):
                    digest.update(block)
            with Path(f"{self.name}.bin").open("rb") as tokens:
                digest.update(tokens.read(_READ))
                tokens.seek(max(0, self.size() - _READ))
                digest.update(tokens.read(_READ))
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror})") from None
        return digest.hexdigest()

    def record_batches(self) -> Iterator[RecordBatch]:
        """All sequences in order. Raises DataError."""
        lengths = _opened(self.name).sequence_lengths
        first, tokens = 0, 0
        for number in range(len(lengths)):
            tokens += int(lengths[number])
            if number + 1 - first >= _SEQUENCES or tokens >= _TOKENS or number + 1 == len(lengths):
                self.share = (number + 1) / len(lengths)
                yield Sequences(self.name, first, number + 1)
                first, tokens = number + 1, 0


@dataclass(frozen=True)
class Sequences:
    """Those from `first` up to `last` of a prefix. Can be pickled: who has it opens the file."""

    prefix: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def records(self) -> Iterator[Record]:
        """All of them in order."""
        opened = _opened(self.prefix)
        for number in range(self.first, self.last):
            yield Record(Where(self.prefix, number + 1), {MEGATRON: opened[number]})


def write(prefix: Path, ids: Path, lengths: np.ndarray) -> None:
    """Write sequences of `lengths` [n], each a document, whose tokens are int32 in the file `ids` one after another.

    The index comes last, and each file is whole when it has its name. Raises DataError.
    """
    indexed = _megatron()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
            unfinished = Path(folder, prefix.name)
            builder = indexed.IndexedDatasetBuilder(f"{unfinished}.bin", dtype=np.int32)
            with ids.open("rb") as tokens:
                shutil.copyfileobj(tokens, builder.data_file, 1 << 24)
            builder.sequence_lengths, builder.document_indices = lengths, np.arange(len(lengths) + 1)
            builder.finalize(f"{unfinished}.idx")
            for suffix in _SUFFIXES:
                Path(f"{unfinished}{suffix}").replace(f"{prefix}{suffix}")
    except OSError as error:
        raise DataError(f"{prefix}: cannot be written ({os.strerror(error.errno or 0)})") from None


def check_target(prefix: Path) -> None:
    """Raises UsageError where `write` would not do."""
    if not prefix.name or not prefix.parent.is_dir():
        raise UsageError(f"--out {prefix}: its folder does not exist")
    there = [f"{prefix}{suffix}" for suffix in _SUFFIXES if Path(f"{prefix}{suffix}").exists()]
    if there:
        raise UsageError(f"--out {prefix}: {there[0]} is there; remove it, or name another prefix")


@lru_cache(maxsize=8)
def _opened(prefix: str) -> Any:
    """Megatron-Core's `IndexedDataset`. Raises DataError for what it does not read, or that lacks tokens."""
    indexed = _megatron()
    try:
        # Its reader complains by `assert`, and by whatever numpy says of a file that is too short.
        opened = indexed.IndexedDataset(prefix)
        lengths, pointers = opened.index.sequence_lengths, opened.index.sequence_pointers
        size = indexed.DType.size(opened.index.dtype)
    except Exception as error:
        raise DataError(f"{prefix}.idx: Megatron-Core cannot read it ({' '.join(str(error).split())})") from None
    if not np.issubdtype(opened.index.dtype, np.integer):
        raise DataError(f"{prefix}.idx: holds {opened.index.dtype.__name__}, which are no tokens")
    if len(lengths) and int((pointers + lengths.astype(np.int64) * size).max()) > _size(f"{prefix}.bin"):
        raise DataError(f"{prefix}.bin: is shorter than its index says; it was cut off, or is another one's")
    return opened


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _megatron() -> Any:
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset
