"""Some records of a source, one after another, as little worked on as can be: what one process reads and another one
parses."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bridge.errors import DataError
from recipes.data.sample import Where


class Record(NamedTuple):
    """What one line or row holds: a value, or the DataError that reading it gave. `blank`: a line of white space."""

    where: Where
    value: Any = None
    error: DataError | None = None
    blank: bool = False


class RecordBatch(Protocol):
    """Can be pickled. Its length is the number of its records."""

    def __len__(self) -> int: ...

    def records(self) -> Iterator[Record]:
        """All of them in order, bad ones too."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """Lines of JSON, from number `first` on; None for one that is longer than `longest` bytes."""

    name: str
    first: int
    lines: Sequence[bytes | None]
    longest: int

    def __len__(self) -> int:
        return len(self.lines)

    def records(self) -> Iterator[Record]:
        for number, line in enumerate(self.lines, self.first):
            where = Where(self.name, number)
            if line is None:
                yield Record(where, error=DataError(f"{where}: longer than {self.longest >> 20} MiB"))
            else:
                yield _json_record(line, where)


@dataclass(frozen=True)
class ArrowRows:
    """Rows of an Arrow table or batch, from number `first` on. Nulls are taken out: Arrow gives every struct of a
    column all the keys that any row has."""

    name: str
    first: int
    rows: Any

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def records(self) -> Iterator[Record]:
        for number, value in enumerate(self.rows.to_pylist(), self.first):
            yield Record(Where(self.name, number), _without_nulls(value))

    def __reduce__(self) -> Any:
        # What pickles a slice of a table itself takes all of that table along.
        pyarrow = importlib.import_module("pyarrow")
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self.rows.schema) as stream:
            stream.write(self.rows)
        return _read_rows, (self.name, self.first, sink.getvalue().to_pybytes())


def _read_rows(name: str, first: int, data: bytes) -> ArrowRows:
    pyarrow = importlib.import_module("pyarrow")
    return ArrowRows(name, first, pyarrow.ipc.open_stream(data).read_all())


@dataclass(frozen=True)
class ParsedRecords:
    """Records that were parsed where they were read."""

    of: Sequence[Record]

    def __len__(self) -> int:
        return len(self.of)

    def records(self) -> Iterator[Record]:
        yield from self.of


def _json_record(line: bytes, where: Where) -> Record:
    if not line or line.isspace():
        return Record(where, blank=True)
    try:
        # The byte order mark that some editors write is no part of the first line.
        text = line.decode("utf-8-sig" if where.line == 1 else "utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Record(where, error=DataError(f"{where}: not UTF-8 at byte {error.start + 1}"))
    except RecursionError:
        return Record(where, error=DataError(f"{where}: nested too deeply"))
    except ValueError as error:
        array = where.line == 1 and line.lstrip().startswith(b"[")
        hint = "; an array over many lines: it is read as one where the file is called .json" if array else ""
        return Record(where, error=DataError(f"{where}: not JSON ({error}){hint}"))
    return Record(where, value)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a key comes twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return value


def no_constant(name: str) -> Any:
    """Raises ValueError: NaN and infinities, which Python's parser would take."""
    raise ValueError(f"{name} is not JSON")


# Made once: `json.loads` with hooks makes one for each line.
_DECODER = json.JSONDecoder(object_pairs_hook=json_object, parse_constant=no_constant)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
