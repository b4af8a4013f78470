"""The folder of caches: what is where in it, and which caches a process uses, so that `data clean` leaves those."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.convert.lock import Lock, beat_at, lives

FOLDER = ".uses"
# A process on another machine renews its use every few seconds; one that has not for so long is gone.
_GONE_NS = 600 * 10**9


def default_folder() -> Path:
    """The folder of caches where `data.cache` names none."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gemma4-bridge" / "data"


def lock_of(cache: Path) -> Path:
    """Held while a cache is made, opened or removed."""
    return cache.with_name(f".{cache.name}.lock")


def parts_of(cache: Path) -> Path:
    """Where its parts are made."""
    return cache.with_name(f".{cache.name}.parts")


class CacheUse:
    """That this process uses a cache, whose lock it holds as it says so; `said`: for what, as `data list` shows it.

    A folder that cannot be written is used all the same: who cannot say so cannot have it cleaned either.
    """

    def __init__(self, cache: Path, said: Mapping[str, Any]) -> None:
        self._lock: Lock | None = None
        with contextlib.suppress(OSError):
            folder = cache.with_name(FOLDER)
            folder.mkdir(exist_ok=True)
            sweep(cache)
            lock = Lock(folder / f"{cache.name}-{uuid.uuid4().hex}")
            lock.take("", None, False)
            self._lock = lock
            _write(folder / f"{cache.name}.json", said)

    def end(self) -> None:
        """It is used no longer. Raises nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def sweep(cache: Path) -> None:
    """Take away the uses of processes that have ended. Raises nothing."""
    for lock in _locks(cache):
        if lives(lock) is False:
            with contextlib.suppress(OSError):
                for record in lock.iterdir():
                    record.unlink()
                lock.rmdir()


def in_use(cache: Path) -> bool:
    """Whether a process that lives, here or elsewhere, uses it. Raises OSError."""
    for lock in _locks(cache):
        alive = lives(lock)
        if alive is None:
            # The clock of the file system: that of another machine may be another.
            beat, now = beat_at(lock), _now(lock.parent)
            alive = beat is not None and now - beat < _GONE_NS
        if alive:
            return True
    return False


def last_use(cache: Path) -> tuple[float, dict[str, Any]]:
    """When it was opened last, as seconds since 1970 (of one that never was: when it was made), and for what."""
    record = cache.with_name(FOLDER) / f"{cache.name}.json"
    try:
        said = json.loads(record.read_text(encoding="utf-8"))
        return record.stat().st_mtime, said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return cache.stat().st_mtime, {}


def forget(cache: Path) -> None:
    """Take away what is known of its uses. Raises nothing."""
    sweep(cache)
    with contextlib.suppress(OSError):
        (cache.with_name(FOLDER) / f"{cache.name}.json").unlink()


def _locks(cache: Path) -> list[Path]:
    try:
        # `-` and no more than the token of 32: a lock in the making has a longer name.
        return [
            path
            for path in cache.with_name(FOLDER).iterdir()
            if path.name.startswith(f"{cache.name}-") and len(path.name) == len(cache.name) + 33
        ]
    except OSError:
        return []


def _now(folder: Path) -> int:
    with tempfile.NamedTemporaryFile(dir=folder, prefix="now-") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _write(path: Path, said: Mapping[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(prefix="new-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(dict(said), file)
    Path(name).replace(path)
