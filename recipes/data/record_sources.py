"""Where records come from: files (`recipes.data.files`), folders and globs of them, Hugging Face datasets.

A record that cannot be read is not an end of the iteration: it comes as its DataError, and the caller's policy decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bridge.errors import DataError
from recipes.data.files import ROWS, DataFile, arrow_batches, first_line, kind_of_file, needed
from recipes.data.megatron import MegatronFile, prefix_of
from recipes.data.record_batches import Record, RecordBatch

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What is read of a folder: other .json there is mostly somebody's configuration.
_IN_FOLDERS = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
# What a row is taken for, beside files: not every dataset knows its size.
_ROW_BYTES = 1024
_SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "eval", "evaluation", "test")


class RecordSource(Protocol):
    """One file or dataset. `root`: the folder of its media, None where it has no folder. `share`: how much of it was
    read by the last of `record_batches`, 0 to 1."""

    share: float

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> Path | None: ...

    def fingerprint(self) -> str:
        """Changes with the content. Raises DataError if it cannot be read."""
        ...

    def size(self) -> int:
        """About how many bytes it has. Raises DataError."""
        ...

    def record_batches(self) -> Iterator[RecordBatch]:
        """All records in order, bad ones too. Raises DataError where it cannot be read on."""
        ...


def find_sources(paths: Sequence[str], *, split: str = "train", subset: str | None = None) -> list[RecordSource]:
    """The sources that `paths` name, in order, a folder's and a glob's files sorted by name.

    Of a folder that has splits, those of `split`. Raises DataError: nothing there, a file of another kind, a dataset
    without the `datasets` package.
    """
    found: list[RecordSource] = []
    for name in paths:
        path = Path(name)
        if (prefix := prefix_of(name)) is not None:
            found.append(MegatronFile(prefix))
        elif path.is_dir():
            found += _folder(path, split)
        elif path.exists():
            found.append(DataFile(path))
        elif any(sign in name for sign in "*?["):
            matches = sorted(match for match in _glob(name) if match.is_file())
            if not matches:
                raise DataError(f"{name}: no file matches")
            found += _matched(matches)
        elif is_hub_name(name):
            found.append(HubDataset(name, split, subset))
        else:
            raise DataError(f"{name}: no such file or folder")
    return found


def _matched(files: Sequence[Path]) -> list[RecordSource]:
    """The files of a glob; of the two that Megatron makes of a text, both are one."""
    prefixes = {file: prefix_of(str(file)) for file in files}
    both = dict.fromkeys(prefix for prefix in prefixes.values() if prefix is not None)
    return [*map(MegatronFile, both), *(DataFile(file) for file, prefix in prefixes.items() if prefix is None)]


def is_data(name: str, beside_data: bool) -> bool:
    """Whether the name of a recipe or of data is one of data: it is there, and no recipe's file, or `beside_data`."""
    path = Path(name)
    if prefix_of(name) is not None:
        return True
    return path.exists() and (beside_data or path.is_dir() or kind_of_file(path) is not None)


def is_hub_name(name: str) -> bool:
    """Whether this is the name of a dataset on the hub, and of nothing here."""
    return bool(_DATASET_NAME.fullmatch(name)) and kind_of_file(Path(name)) is None and not Path(name).exists()


def hub_split_names(name: str, subset: str | None) -> list[str]:
    """The splits of a dataset on the hub. Raises DataError, and UsageError without the `datasets` package."""
    datasets = _datasets(name)
    try:
        return list(datasets.get_dataset_split_names(name, subset))
    except Exception as error:
        raise DataError(f"{name}: its splits cannot be read ({first_line(error)}); set data.eval_split") from error


def local_splits(name: str) -> list[str]:
    """The splits of a folder, of `datasets` or of files and folders named by them; none of anything else.

    Raises DataError.
    """
    path = Path(name) / "dataset_dict.json"
    if path.is_file():
        try:
            return [str(split) for split in json.loads(path.read_text(encoding="utf-8"))["splits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a list of splits ({error})") from None
    if not Path(name).is_dir():
        return []
    return list(dict.fromkeys(split for file in _files(Path(name)) if (split := _split_of(file)) is not None))


def _folder(path: Path, split: str) -> list[RecordSource]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [HubDataset(str(path), split, None, saved=True)]
    files = _files(path)
    if not files:
        raise DataError(
            f"{path}: no .jsonl, .parquet or .csv file in this folder (of the folders in it, only data, "
            "and those called as a split, are searched)"
        )
    splits = {file: _split_of(file) for file in files}
    chosen = [file for file in files if splits[file] == split]
    if not chosen and split == "train":
        # Names that say nothing of a split are of the one that people train on; train_chats.jsonl is, alone, too.
        chosen = [file for file in files if splits[file] is None]
        alike = {name for name in splits.values() if name is not None and name.startswith("train")}
        if not chosen and len(alike) == 1:
            chosen = [file for file in files if splits[file] in alike]
    if not chosen:
        there = ", ".join(sorted({name for name in splits.values() if name is not None})) or "none"
        raise DataError(f"{path}: has no files of the split {split}; its splits: {there} (data.split)")
    return [DataFile(file) for file in chosen]


def _files(folder: Path) -> list[Path]:
    """The data files of a folder: in it, in `data`, and in folders that are called as a split."""

    def here(path: Path) -> list[Path]:
        return sorted(
            file
            for file in path.iterdir()
            if file.is_file() and (kind_of_file(file) in _IN_FOLDERS or (kind_of_file(file) and _split_of(file)))
        )

    try:
        direct = here(folder)
        inner = sorted(one for one in folder.iterdir() if one.is_dir() and (one.name == "data" or _called(one.name)))
        return direct or [file for one in inner for file in here(one)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _split_of(file: Path) -> str | None:
    """The split that a file's name begins with (`test-00000-of-00001.parquet`), or else its folder's; None for none."""
    return _called(file.name.partition(".")[0]) or (_called(file.parent.name) if file.parent.name != "data" else None)


def _called(name: str) -> str | None:
    """`train`, and `train_sft` of the hub, without the numbers of their files."""
    word = re.match("[a-z]+", name)
    if word is None or word.group() not in _SPLIT_NAMES:
        return None
    bare = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", name)
    return bare or None


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    fixed = next(index for index, part in enumerate(path.parts) if any(sign in part for sign in "*?["))
    return Path(*path.parts[:fixed]).glob(str(Path(*path.parts[fixed:])))


class HubDataset:
    """A dataset of the Hugging Face hub, or one that `datasets` saved to disk. Needs the `datasets` package."""

    def __init__(self, name: str, split: str, subset: str | None, *, saved: bool = False) -> None:
        self.name, self.root = name, Path(name) if saved else None
        self._split, self._subset, self._saved = split, subset, saved
        self._loaded: Any = None
        self.share = 0.0

    def _dataset(self) -> Any:
        if self._loaded is not None:
            return self._loaded
        datasets = _datasets(self.name)
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
            raise DataError(f"{self.name}: {what} `datasets` can load ({first_line(error)})") from error
        return self._loaded

    def fingerprint(self) -> str:
        return f"{self._split}:{self._dataset()._fingerprint}"

    def size(self) -> int:
        return len(self._dataset()) * _ROW_BYTES

    def record_batches(self) -> Iterator[RecordBatch]:
        rows, read = max(1, len(self._dataset())), 0
        for batch in arrow_batches(self._dataset().iter(batch_size=ROWS), self.name):
            read += len(batch)
            self.share = read / rows
            yield batch

    def records(self) -> Iterator[Record]:
        """All records in order, one by one."""
        for batch in self.record_batches():
            yield from batch.records()


def _datasets(name: str) -> Any:
    return needed("datasets", "datasets", name, "neither a file nor a folder here, and reading a dataset of that name")
