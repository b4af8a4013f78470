"""The caches of prepared data: which there are, of what, how large and how old; and how they are removed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.convert.lock import held, lives
from bridge.errors import BridgeError, DataError, UsageError
from recipes.data.fingerprints import FOLDER as FILES
from recipes.data.uses import forget, in_use, last_use, lock_of, parts_of

_NAME = re.compile("[0-9a-f]{32}")
_AGES = {"h": 3600, "d": 86400, "w": 7 * 86400}
# What `remove` calls a cache before it takes it away.
_REMOVED = re.compile(r"\.[0-9a-f]{32}\.removed-[0-9a-f]{32}")


@dataclass(frozen=True)
class Cache:
    """One of them. `bytes`: on disk; `used`: when it was opened last, in seconds since 1970; `said`: for what.

    `state`: complete, unfinished (a preparation that was ended, which the next one goes on with) or damaged.
    `live`: a process that lives makes it or uses it.
    """

    folder: Path
    state: str
    bytes: int
    used: float
    files: tuple[str, ...]
    samples: int
    tokens: int
    said: dict[str, Any]
    live: bool

    def to_json(self) -> dict[str, Any]:
        """For programs; `age` in seconds."""
        return {
            "folder": str(self.folder),
            "state": self.state,
            "bytes": self.bytes,
            "age": round(time.time() - self.used),
            "files": list(self.files),
            "samples": self.samples,
            "tokens": self.tokens,
            "used_by": self.said,
            "live": self.live,
        }


def find(folder: Path) -> list[Cache]:
    """All in a folder of caches, the one that was used last first; of other things that lie there, none.

    Raises DataError where it cannot be read.
    """
    if not folder.exists():
        return []
    try:
        names = {path.name.removeprefix(".").removesuffix(".parts") for path in folder.iterdir() if path.is_dir()}
        found = [_look(folder / name) for name in names if _NAME.fullmatch(name)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted((one for one in found if one is not None), key=lambda one: -one.used)


def _look(cache: Path) -> Cache | None:
    parts = parts_of(cache)
    if not cache.is_dir() and not parts.is_dir():
        return None
    live = in_use(cache) or lives(lock_of(cache)) is not False
    meta: dict[str, Any] = {}
    state = "complete" if cache.is_dir() else "unfinished"
    if state == "complete":
        try:
            meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
            files, statistics = tuple(map(str, meta["sources"])), meta["statistics"]
            used, said = last_use(cache)
            samples, tokens = int(statistics["samples"]), int(statistics["tokens"])
            return Cache(cache, state, _bytes(cache) + _bytes(parts), used, files, samples, tokens, said, live)
        except FileNotFoundError:
            # No cache ever lacks it: this is somebody else's.
            return None
        except (ValueError, KeyError, TypeError):
            state = "damaged"
    there = cache if cache.is_dir() else parts
    return Cache(cache, state, _bytes(cache) + _bytes(parts), there.stat().st_mtime, (), 0, 0, {}, live)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A process may take its files away as they are counted.
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def older_than(age: str) -> float:
    """An age such as 12h, 30d or 8w in seconds. Raises UsageError."""
    found = re.fullmatch(r"(\d+)([hdw])", age)
    if found is None:
        raise UsageError(f"--older-than {age}: is a number with h, d or w (hours, days, weeks), such as 30d")
    return int(found.group(1)) * _AGES[found.group(2)]


def remove(caches: list[Cache], notify: Callable[[str], None]) -> Iterator[Cache]:
    """Remove them, but for what a live process makes or uses; gives those that are gone. Raises DataError."""
    for cache in caches:
        folder = cache.folder
        try:
            with held(lock_of(folder), f"{folder}: is being prepared or opened"):
                # Under the lock nobody begins to use it.
                if in_use(folder):
                    notify(f"{folder}: stays, a process uses it")
                    continue
                for there in (folder, parts_of(folder)):
                    if there.exists():
                        # Whatever ends this, nobody finds half of it.
                        aside = folder.with_name(f".{folder.name}.removed-{uuid.uuid4().hex}")
                        there.rename(aside)
                        shutil.rmtree(aside, ignore_errors=True)
                forget(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be removed ({error.strerror})") from None
        except BridgeError as error:
            notify(f"{error}; it stays")
            continue
        yield cache


def tidy(folder: Path) -> None:
    """Take away what removals left that were ended, and what is known of files that no cache is of. Raises nothing."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _REMOVED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        if not any(_NAME.fullmatch(path.name) for path in folder.iterdir()):
            for record in (folder / FILES).glob("*.json"):
                record.unlink()
