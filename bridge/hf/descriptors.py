"""Files that are open while they are used, a few of them: a checkpoint may have more files than a process may open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bridge.close_on_exit import CloseOnExit
from bridge.errors import CheckpointError
from bridge.hf.tensors import open_regular, printable

# The usual limit of a process is 1024, a careful one 64, and other code needs some as well.
MAX_IDLE = 16


@dataclass
class _Open:
    fd: int
    users: int = 0


class Descriptors(CloseOnExit):
    """Open files by path: those in use, and up to `max_idle` that are kept for the next use. Thread-safe.

    `opener` opens a path; it raises what `use` raises.
    """

    def __init__(self, opener: Callable[[Path], int], max_idle: int = MAX_IDLE) -> None:
        self._opener, self._max_idle = opener, max_idle
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _Open] = OrderedDict()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A descriptor of the file, which stays open for the block at least."""
        with self._lock:
            if path not in self._files:
                self._files[path] = _Open(self._opener(path))
            file = self._files[path]
            file.users += 1
            self._files.move_to_end(path)
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                self._trim()

    def _trim(self) -> None:
        idle = [path for path, file in self._files.items() if not file.users]
        for path in idle[: max(0, len(idle) - self._max_idle)]:
            os.close(self._files.pop(path).fd)

    def drop(self, path: Path) -> None:
        """Close a file that nobody uses any more, if it is open."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            os.close(file.fd)

    def close(self) -> None:
        """Close all of them. Safe to call twice."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1].fd)


class RegularFiles(Descriptors):
    """Regular files that are read. One whose size or time of change is not that of its first opening is refused."""

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        super().__init__(self._open, max_idle)
        self._first: dict[Path, tuple[int, int]] = {}

    def size(self, path: Path) -> int:
        """Bytes of the file, as it was first opened. Raises CheckpointError."""
        if path not in self._first:
            with self.use(path):
                pass
        return self._first[path][0]

    def _open(self, path: Path) -> int:
        fd, size = open_regular(path)
        now = (size, os.fstat(fd).st_mtime_ns)
        if self._first.setdefault(path, now) != now:
            os.close(fd)
            raise CheckpointError(f"{printable(path)}: changed while it was being read")
        return fd
