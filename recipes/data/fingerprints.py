"""Digests of data files, remembered by what the file system says of them: a second start reads no data.

A record beside the caches has path, size and times of change of every file, with the digest of its content. Where these
are as they were the digest counts; where they are not, or there is none, the file is read once, by one process of all
that share the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bridge.convert.lock import held
from bridge.errors import DataError
from recipes.data.files import DataFile
from recipes.data.record_sources import RecordSource

FOLDER = ".files"
# A file that was changed so shortly before it was read may change again within one tick of its clock.
_SETTLED_S = 2.0
# So many bytes take long enough to be told of.
_WORTH_SAYING = 1 << 30


def fingerprints(
    sources: Sequence[RecordSource], caches: Path, workers: int, notify: Callable[[str], None]
) -> list[str]:
    """Of each source; of files by the record in the folder `caches`, which exists. Raises DataError."""
    files = [source for source in sources if isinstance(source, DataFile)]
    known = _of_files(files, caches, workers, notify) if files else {}
    return [known[source.name] if isinstance(source, DataFile) else source.fingerprint() for source in sources]


def _of_files(files: Sequence[DataFile], caches: Path, workers: int, notify: Callable[[str], None]) -> dict[str, str]:
    """By the names of the files."""
    paths = {file.name: str(file.path.resolve()) for file in files}
    which = hashlib.sha256("\0".join(sorted(paths.values())).encode()).hexdigest()[:32]
    record = caches / FOLDER / f"{which}.json"
    found = _known(record, files, paths)
    if len(found) == len(paths):
        return found
    try:
        record.parent.mkdir(exist_ok=True)
        # Of all ranks one reads.
        with held(record.with_suffix(".lock"), str(caches), notify=notify, wait=True):
            found = _known(record, files, paths)
            missing = [file for file in files if file.name not in found]
            size = sum(_stat(file)[0] for file in missing)
            if size >= _WORTH_SAYING:
                notify(f"reading {size / 1e9:.1f} GB once, to know them again by their sizes and times")
            before, now = {file.name: _stat(file) for file in files}, time.time_ns()
            found |= _read(missing, workers)
            rows = {
                paths[file.name]: [*facts, found[file.name]]
                for file in files
                if (facts := before[file.name]) == _stat(file) and now - max(facts[1:]) > _SETTLED_S * 1e9
            }
            _write(record, rows)
    except OSError as error:
        raise DataError(f"{caches}: the cache cannot be written ({error.strerror})") from None
    return found


def _read(files: Sequence[DataFile], workers: int) -> dict[str, str]:
    """Their digests. A signal that comes meanwhile ends the reading: the pool waits for its threads."""
    given_up = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            digests = pool.map(lambda file: file.fingerprint(given_up.is_set), files)
            return {file.name: digest for file, digest in zip(files, digests, strict=True)}
        except BaseException:
            given_up.set()
            raise


def _known(record: Path, files: Sequence[DataFile], paths: dict[str, str]) -> dict[str, str]:
    """The digests of those files that are as the record says."""
    try:
        rows: dict[str, list[Any]] = json.loads(record.read_text(encoding="utf-8"))
        return {
            file.name: str(row[3])
            for file in files
            if (row := rows.get(paths[file.name])) is not None and row[:3] == _stat(file)
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}


def _stat(file: DataFile) -> list[int]:
    """Size; when the content was changed, and when anything was, which no tool sets back; in nanoseconds."""
    try:
        info = file.path.stat()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _write(record: Path, rows: dict[str, list[Any]]) -> None:
    descriptor, name = tempfile.mkstemp(prefix="new-", dir=record.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(rows, file)
    Path(name).replace(record)
