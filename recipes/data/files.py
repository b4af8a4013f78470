"""Files of records: JSON lines, arrays of JSON, CSV, Parquet; plain, or packed by gzip or Zstandard."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bridge.errors import DataError, UsageError
from recipes.data.record_batches import (
    ArrowRows,
    JsonLines,
    ParsedRecords,
    Record,
    RecordBatch,
    json_object,
    no_constant,
)
from recipes.data.sample import Where

# A line that holds base64 images can be long; one without an end must not fill the memory.
_MAX_LINE = 256 * 2**20
# A batch ends with whichever comes first.
ROWS, _BATCH_BYTES = 64, 1 << 20
_CHUNK = 1 << 16
_PACKED = (".gz", ".zst")
_SPACE = re.compile(r"[ \t\n\r]*")


class DataFile:
    """One file of a kind of `_KINDS`. `root`: the folder of its media. `share`: how much of it is read, 0 to 1.

    A line's or row's number counts from 1: of CSV, the line where the row begins; of an array, its elements.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError for what is no such file."""
        self.path, self.name, self.root = path, str(path), path.parent
        suffix = kind_of_file(path)
        if suffix is None:
            raise DataError(f"{path}: expected one of {', '.join(_KINDS)}, or these with {' or '.join(_PACKED)}")
        # A pipe or a device would be waited for without end.
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file")
        self._kind = _KINDS[suffix]
        self.share = 0.0

    def fingerprint(self, given_up: Callable[[], bool] = lambda: False) -> str:
        """Changes with the content; "" where it is `given_up` on the way. Raises DataError if it cannot be read."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        try:
            with self.path.open("rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    digest.update(buffer[:size])
                    if given_up():
                        return ""
            return digest.hexdigest()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def size(self) -> int:
        """In bytes, as it lies there. Raises DataError."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def record_batches(self) -> Iterator[RecordBatch]:
        """All records in order. Raises DataError where the file cannot be read on."""
        try:
            with _opened(self.path, self._kind.seeks) as (file, share):
                for batch in self._kind.record_batches(file, self.name):
                    self.share = share()
                    yield batch
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self.name}: cannot be read ({why})") from None

    def records(self) -> Iterator[Record]:
        """The same, one by one."""
        for batch in self.record_batches():
            yield from batch.records()


def kind_of_file(path: Path) -> str | None:
    """The ending that says how a file is written, without that of its packing; None for one of no kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else None


@contextmanager
def _opened(path: Path, seeks: bool) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """The bytes of a file, unpacked, and how much of it has been read, 0 to 1; `seeks`: one to be read anywhere."""
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        size = max(1, path.stat().st_size)
        if suffix not in _PACKED:
            yield raw, lambda: raw.tell() / size
            return
        with _unpacked(raw, path, suffix) as packed:
            if not seeks:
                yield packed, lambda: raw.tell() / size
                return
            with tempfile.TemporaryFile() as whole:
                shutil.copyfileobj(packed, whole, 1 << 20)
                length = max(1, whole.tell())
                whole.seek(0)
                yield whole, lambda: whole.tell() / length


@contextmanager
def _unpacked(raw: IO[bytes], path: Path, suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as file:
            yield file  # type: ignore[misc]
        return
    pyarrow = needed("pyarrow", "pyarrow", str(path), "reading .zst")
    with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
        yield io.BufferedReader(stream, 1 << 20)


def _json_lines(file: IO[bytes], name: str) -> Iterator[RecordBatch]:
    first, lines, held = 1, list[bytes | None](), 0
    while line := file.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE)
            lines.append(None)
        else:
            lines.append(line)
            held += len(line)
        if len(lines) >= ROWS or held >= _BATCH_BYTES:
            yield JsonLines(name, first, lines, _MAX_LINE)
            first, lines, held = first + len(lines), [], 0
    if lines:
        yield JsonLines(name, first, lines, _MAX_LINE)


def _json_file(file: IO[bytes], name: str) -> Iterator[RecordBatch]:
    """An array, where it begins as one; else lines."""
    text = io.TextIOWrapper(file, "utf-8-sig")
    start = text.read(_CHUNK)
    if start.lstrip()[:1] != "[":
        text.detach().seek(0)
        yield from _json_lines(file, name)
        return
    rows: list[Record] = []
    try:
        for number, value in enumerate(_elements(text, start, name), 1):
            rows.append(Record(Where(name, number), value))
            if len(rows) == ROWS:
                yield ParsedRecords(rows)
                rows = []
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error.reason})") from None
    if rows:
        yield ParsedRecords(rows)


def _elements(text: IO[str], held: str, name: str) -> Iterator[Any]:
    """The elements of an array, one at a time. Raises DataError where it is none; what came before is good."""
    decoder = json.JSONDecoder(object_pairs_hook=json_object, parse_constant=no_constant)
    at, count = held.index("[") + 1, 0
    while True:
        size, error = _CHUNK, ""
        while True:
            start = _blank(held, at)
            if held[start : start + 1] == "]":
                if held[start + 1 :].strip() or text.read().strip():
                    raise DataError(f"{name}: goes on behind the end of its array")
                return
            try:
                value, end = decoder.raw_decode(held, start)
                end = _blank(held, end)
                if held[end : end + 1] in (",", "]") and end < len(held):
                    break
                error = "expected , or ]"
            except RecursionError:
                raise DataError(f"{name}:{count + 1}: nested too deeply") from None
            except ValueError as problem:
                error = str(problem)
            if len(held) - start > _MAX_LINE:
                raise DataError(f"{name}:{count + 1}: longer than {_MAX_LINE >> 20} MiB")
            more = text.read(size)
            if not more:
                raise DataError(f"{name}:{count + 1}: not JSON, and what follows cannot be read ({error})")
            # Twice as much each time: a long element is parsed again only a few times.
            held, at, size = held[start:] + more, 0, 2 * size
        count += 1
        yield value
        at = end + (held[end] == ",")


def _blank(text: str, at: int) -> int:
    """Where white space ends."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _csv(delimiter: str) -> Callable[[IO[bytes], str], Iterator[RecordBatch]]:
    def batches(file: IO[bytes], name: str) -> Iterator[RecordBatch]:
        csv.field_size_limit(_MAX_LINE)
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            names = next(reader, None)
            if not names or len(set(names)) < len(names):
                raise DataError(f"{name}:1: expected the names of the columns, each once")
            rows: list[Record] = []
            line = reader.line_num + 1
            for row in reader:
                where = Where(name, line)
                line = reader.line_num + 1
                rows.append(_csv_record(row, names, where))
                if len(rows) == ROWS:
                    yield ParsedRecords(rows)
                    rows = []
            if rows:
                yield ParsedRecords(rows)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise DataError(f"{name}:{reader.line_num}: not CSV ({error})") from None

    return batches


def _csv_record(row: list[str], names: list[str], where: Where) -> Record:
    if not row:
        return Record(where, blank=True)
    if len(row) != len(names):
        return Record(where, error=DataError(f"{where}: {len(row)} fields, where there are {len(names)} columns"))
    # An empty field says nothing.
    return Record(where, {key: value for key, value in zip(names, row, strict=True) if value})


def _parquet(file: IO[bytes], name: str) -> Iterator[RecordBatch]:
    parquet = needed("pyarrow.parquet", "pyarrow", name, "reading Parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            yield from arrow_batches(opened.iter_batches(batch_size=ROWS), name)
    except DataError:
        raise
    except Exception as error:
        # pyarrow's own errors are many; what they have in common is that the file cannot be read on.
        raise DataError(f"{name}: not a readable Parquet file ({first_line(error)})") from error


def arrow_batches(tables: Iterator[Any], name: str) -> Iterator[RecordBatch]:
    """Arrow's tables, or record batches, as `RecordBatch`."""
    first = 1
    for table in tables:
        yield (batch := ArrowRows(name, first, table))
        first += len(batch)


@dataclass(frozen=True)
class _Kind:
    """How the files of an ending are read. `seeks`: not from front to back."""

    record_batches: Callable[[IO[bytes], str], Iterator[RecordBatch]]
    seeks: bool = False


_KINDS = {
    ".jsonl": _Kind(_json_lines),
    ".ndjson": _Kind(_json_lines),
    ".json": _Kind(_json_file, seeks=True),
    ".parquet": _Kind(_parquet, seeks=True),
    ".csv": _Kind(_csv(",")),
    ".tsv": _Kind(_csv("\t")),
}


def needed(module: str, package: str, name: str, what: str) -> Any:
    """A module of a package that not everybody has. Raises UsageError that says what it is needed for."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{name}: {what} needs the Python package `{package}`: pip install {package}") from None


def first_line(error: BaseException) -> str:
    """What an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
