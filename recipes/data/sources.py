"""Where records come from: JSONL and Parquet files, folders and globs of them, Hugging Face datasets.

A record that cannot be read is not an end of the iteration: it comes as its DataError, and the caller's policy decides.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bridge.errors import DataError, UsageError
from recipes.data.sample import Where

_JSONL = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSONL, ".parquet")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# A line that holds base64 images can be long; one without an end must not fill the memory.
_MAX_LINE = 256 * 2**20
_ROWS = 256


@dataclass(frozen=True)
class Record:
    """What one line or row holds: a value, or the DataError that reading it gave. `blank`: a line of white space."""

    where: Where
    value: Any = None
    error: DataError | None = None
    blank: bool = False


class Source(Protocol):
    """One file or dataset. `root`: the folder of its media, None where it has no folder."""

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> Path | None: ...

    def fingerprint(self) -> str:
        """Changes with the content. Raises DataError if it cannot be read."""
        ...

    def records(self) -> Iterator[Record]:
        """All records in order, bad ones too."""
        ...


def find_sources(paths: Sequence[str], *, split: str = "train", subset: str | None = None) -> list[Source]:
    """The sources that `paths` name, in order, a folder's and a glob's files sorted by name.

    Raises DataError: nothing there, a file of another kind, a dataset without the `datasets` package.
    """
    found: list[Source] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found += _folder(path, split)
        elif path.exists():
            found.append(_file(path))
        elif any(sign in name for sign in "*?["):
            matches = sorted(match for match in _glob(name) if match.is_file())
            if not matches:
                raise DataError(f"{name}: no file matches")
            found += [_file(match) for match in matches]
        elif is_hub_name(name):
            found.append(HubDataset(name, split, subset))
        else:
            raise DataError(f"{name}: no such file or folder")
    return found


def is_hub_name(name: str) -> bool:
    """Whether this is the name of a dataset on the hub, and of nothing here."""
    return bool(_DATASET_NAME.fullmatch(name)) and not name.endswith(_SUFFIXES) and not Path(name).exists()


def hub_split_names(name: str, subset: str | None) -> list[str]:
    """The splits of a dataset on the hub. Raises DataError, and UsageError without the `datasets` package."""
    datasets = _needed("datasets", "datasets", name)
    try:
        return list(datasets.get_dataset_split_names(name, subset))
    except Exception as error:
        raise DataError(f"{name}: its splits cannot be read ({_first_line(error)}); set data.eval_split") from error


def _folder(path: Path, split: str) -> list[Source]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [HubDataset(str(path), split, None, saved=True)]
    files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".ndjson", ".parquet"))
    if not files:
        raise DataError(f"{path}: no .jsonl or .parquet file in this folder (folders in it are not searched)")
    return [_file(file) for file in files]


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    fixed = next(index for index, part in enumerate(path.parts) if any(sign in part for sign in "*?["))
    return Path(*path.parts[:fixed]).glob(str(Path(*path.parts[fixed:])))


def _file(path: Path) -> Source:
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected one of {', '.join(_SUFFIXES)}")
    # A pipe or a device would be waited for without end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a regular file")
    return ParquetFile(path) if path.suffix == ".parquet" else JsonlFile(path)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


class JsonlFile:
    """One JSON object a line, UTF-8. Lines of white space are blank, not records."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.root = path, str(path), path.parent

    def fingerprint(self) -> str:
        return _digest(self.path)

    def records(self) -> Iterator[Record]:
        try:
            with self.path.open("rb") as file:
                number = 0
                while line := file.readline(_MAX_LINE + 1):
                    number += 1
                    where = Where(self.name, number)
                    if len(line) > _MAX_LINE:
                        while line and not line.endswith(b"\n"):
                            line = file.readline(_MAX_LINE)
                        yield Record(where, error=DataError(f"{where}: longer than {_MAX_LINE >> 20} MiB"))
                        continue
                    yield _json_record(line, where)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror})") from None


def _json_record(line: bytes, where: Where) -> Record:
    if not line.strip():
        return Record(where, blank=True)
    try:
        # The byte order mark that some editors write is no part of the first line.
        text = line.decode("utf-8-sig" if where.line == 1 else "utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Record(where, error=DataError(f"{where}: not UTF-8 at byte {error.start + 1}"))
    except RecursionError:
        return Record(where, error=DataError(f"{where}: nested too deeply"))
    except ValueError as error:
        array = where.line == 1 and line.lstrip().startswith(b"[")
        hint = "; an array over many lines, where every line is to be an object" if array else ""
        return Record(where, error=DataError(f"{where}: not JSON ({error}){hint}"))
    return Record(where, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class ParquetFile:
    """Rows of a Parquet file. Needs pyarrow.

    Parquet gives every struct of a column all the keys that any row has, filled with nulls; they are taken out.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.root = path, str(path), path.parent

    def fingerprint(self) -> str:
        return _digest(self.path)

    def records(self) -> Iterator[Record]:
        parquet = _needed("pyarrow.parquet", "pyarrow", self.name)
        try:
            with parquet.ParquetFile(self.path) as file:
                yield from _numbered(file.iter_batches(batch_size=_ROWS), self.name)
        except DataError:
            raise
        except Exception as error:
            # pyarrow's own errors are many; what they have in common is that the file cannot be read on.
            raise DataError(f"{self.name}: not a readable Parquet file ({_first_line(error)})") from error


class HubDataset:
    """A dataset of the Hugging Face hub, or one that `datasets` saved to disk. Needs the `datasets` package."""

    def __init__(self, name: str, split: str, subset: str | None, *, saved: bool = False) -> None:
        self.name, self.root = name, Path(name) if saved else None
        self._split, self._subset, self._saved = split, subset, saved
        self._loaded: Any = None

    def _dataset(self) -> Any:
        if self._loaded is not None:
            return self._loaded
        datasets = _needed("datasets", "datasets", self.name)
        try:
            if self._saved:
                loaded = datasets.load_from_disk(self.name)
                loaded = loaded[self._split] if isinstance(loaded, Mapping) else loaded
            else:
                loaded = datasets.load_dataset(self.name, self._subset, split=self._split)
            # As Arrow, images stay the bytes that they are.
            self._loaded = loaded.with_format("arrow")
        except Exception as error:
            what = "neither a file or folder here nor a dataset that" if not self._saved else "a dataset folder that"
            raise DataError(f"{self.name}: {what} `datasets` can load ({_first_line(error)})") from error
        return self._loaded

    def fingerprint(self) -> str:
        return f"{self._split}:{self._dataset()._fingerprint}"

    def records(self) -> Iterator[Record]:
        yield from _numbered(self._dataset().iter(batch_size=_ROWS), self.name)


def _numbered(tables: Iterator[Any], name: str) -> Iterator[Record]:
    row = 0
    for table in tables:
        for value in table.to_pylist():
            row += 1
            yield Record(Where(name, row), _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _needed(module: str, package: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{name}: neither a file nor a folder here, and to read a dataset of that name the Python package "
            f"`{package}` is needed: pip install {package}"
            if package == "datasets"
            else f"{name}: reading Parquet needs the Python package `{package}`: pip install {package}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
