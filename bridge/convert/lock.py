"""One process at a time at a place, across machines, on every file system that renames folders.

flock does not do it: NFS and Lustre have no lock operation for folders, so the kernel keeps such a lock to one machine,
and a mount option does the same to locks of files, or refuses them. Here a lock is a folder that holds a record of its
owner and appears by a rename, which fails where a folder that is not empty stands.

An owner whose process can be asked about (the same machine since its start, the same PID namespace) lives or does not.
One elsewhere renews its record's time of change every few seconds, and counts as gone when that stands still for a
minute; no clock is compared with another's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge.errors import CheckpointError, UsageError
from bridge.hf.tensors import printable, write_error

_RECORD = "owner.json"
_BEAT_S = 5.0
_POLL_S = 1.0
# Looks at a record from elsewhere, in a row and a second apart, that find it unchanged before its owner counts as gone.
# Looks, not seconds: while a file server hangs, neither the owner nor who waits for it gets anywhere.
_STALE_POLLS = 60
# What a place without room or permission says; any other refusal of a rename is the file system's.
_ORDINARY = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG)
# Mounts of object stores, where renaming a folder is copying its files one by one.
_OBJECT_STORES = frozenset(
    f"fuse.{name}"
    for name in ("s3fs", "goofys", "geesefs", "rclone", "gcsfuse", "mountpoint-s3", "blobfuse", "blobfuse2", "ossfs")
)
# The locks of this process by their tokens. Weak: one whose release an interrupt cut off ends with its object.
_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `space`: where `pid` means something; `started`: tells a process from a later one of its id."""

    token: str
    host: str
    space: str
    pid: int
    started: str

    @classmethod
    def new(cls) -> Owner:
        """A record of this process."""
        return cls(uuid.uuid4().hex, socket.gethostname(), _space(), os.getpid(), _started(os.getpid()) or "")

    def gone(self) -> bool | None:
        """Whether its process has ended; None where that cannot be known from here."""
        if self.space != _space():
            return None
        if self.pid == os.getpid():
            return self.token not in _held
        started = _started(self.pid)
        return started is None or started != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _space() -> str:
    """The machine since its start, and the PID namespace; containers on one machine have one boot and several of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process was started, as far as the system says; None where there is none that runs."""
    try:
        # Behind the name, which may hold anything: the state, and as the 20th the time of the start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


class Lock:
    """A held lock; `held` makes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = Owner.new()
        self._mine = path.with_name(f"{path.name}.{self.owner.token}")
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._done.set)

    def is_ours(self) -> bool:
        """Whether nobody has taken it over since."""
        there = _read(self.path)
        return there is not None and there[0] == self.owner

    def check(self) -> None:
        """Raise CheckpointError where somebody else took it over, or it is no longer there."""
        if not self.is_ours():
            there = _read(self.path)
            who = "is gone" if there is None else f"was taken over by {there[0] or 'another process'}"
            raise CheckpointError(f"{printable(self.path)}: the lock {who}, so nothing more is written")

    def take(self, busy: str, notify: Callable[[str], None] | None, wait: bool) -> None:
        """Take it, from an owner that is gone too. Raises UsageError that begins with `busy`."""
        _held[self.owner.token] = self
        self._prepare()
        before: tuple[Owner | None, int] | None = None
        unchanged, absent = 0, 0
        while not self._appeared():
            there = _read(self.path)
            if there is None:
                # Between a look and the next the owner gave it back; or it is something else.
                absent += 1
                if absent > _STALE_POLLS:
                    raise CheckpointError(f"{printable(self.path)}: is in the way of a lock; remove it")
                time.sleep(0.01)
                continue
            owner, absent = there[0], 0
            gone = None if owner is None else owner.gone()
            unchanged = unchanged + 1 if there == before else 0
            alive = gone is False or (before is not None and before[0] == owner and unchanged == 0)
            if alive and not wait:
                raise UsageError(f"{busy} ({owner or printable(self.path)})")
            if gone or (gone is None and unchanged >= _STALE_POLLS):
                if self._displace(there) and notify is not None:
                    notify(f"{printable(self.path)}: taken over from {owner or 'an owner'}, which is gone")
                before = None
                continue
            if before is None and not alive and notify is not None:
                notify(f"{printable(self.path)}: held by {owner or 'an owner'}: waiting to see whether it is alive")
            before = there
            # What is known at a look can be looked at often.
            time.sleep(_POLL_S if gone is None else _POLL_S / 10)
        self._sweep()
        self._thread = threading.Thread(target=_beat, args=(self.path / _RECORD, self._done), name="lock", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        for attempt in reversed(range(10)):
            try:
                self._mine.mkdir(exist_ok=True)
                (self._mine / _RECORD).write_text(json.dumps(asdict(self.owner)), encoding="utf-8")
                return
            except FileNotFoundError:
                # Another process that swept took it, before the record was in it.
                if not attempt:
                    raise

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they waited for this lock."""
        for path in list(self.path.parent.iterdir()):
            if path.name.startswith(f"{self.path.name}."):
                there = _read(path)
                if there is None:
                    with contextlib.suppress(OSError):
                        path.rmdir()
                elif there[0] is not None and there[0].gone():
                    shutil.rmtree(path, ignore_errors=True)

    def _appeared(self) -> bool:
        try:
            self._mine.rename(self.path)
        except OSError as error:
            # Some file systems have other words for a folder that is in the way.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or _read(self.path) is not None:
                return False
            if error.errno in _ORDINARY:
                raise
            raise CheckpointError(
                f"{printable(self.path.parent)}: folders cannot be renamed there ({error.strerror}), and what is "
                "complete or absent has to be: write to another disk, and copy"
            ) from None
        return True

    def _displace(self, seen: tuple[Owner | None, int]) -> bool:
        """Remove the lock that was seen, and no other: somebody may have taken it over since."""
        aside = self._mine.with_name(f"{self._mine.name}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return False
        if _read(aside) != seen:
            # Where a third one came in between, the owner that was put aside finds out by `check`.
            with contextlib.suppress(OSError):
                aside.rename(self.path)
                return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def release(self) -> None:
        """Give it back; what was not taken is tidied up. Raises nothing."""
        _held.pop(self.owner.token, None)
        self._done.set()
        if self._thread is not None and self._thread.ident is not None:
            # NFS keeps a file that is still open in its folder, under another name.
            self._thread.join(_BEAT_S)
        with contextlib.suppress(OSError):
            if self.is_ours():
                (self.path / _RECORD).unlink()
                # An empty folder is a free lock: the next one may have it already.
                self.path.rmdir()
        shutil.rmtree(self._mine, ignore_errors=True)


def _beat(record: Path, done: threading.Event) -> None:
    # By its descriptor: what stands at the path may by then be another's.
    with contextlib.suppress(OSError):
        fd = os.open(record, os.O_RDWR | os.O_CLOEXEC)
        try:
            while not done.wait(_BEAT_S):
                os.utime(fd)
        finally:
            os.close(fd)


def _read(path: Path) -> tuple[Owner | None, int] | None:
    """The record of a lock (None: unreadable) and its time of change; None where there is no lock."""
    try:
        # Opened anew each time: network file systems ask the server then.
        with (path / _RECORD).open("rb") as file:
            text, changed = file.read(1 << 16), os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
    try:
        return Owner(**json.loads(text)), changed
    except (ValueError, TypeError, RecursionError):
        return None, changed


def _check_renames(path: Path, mounts: str | None = None) -> None:
    """Raise CheckpointError where `path` lies on a file system that renames folders, but not in one step."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return
    resolved = path.parent.resolve()
    deepest, kind = Path("/"), ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split()[4].encode("latin-1", "ignore").decode("unicode_escape"))
        if resolved.is_relative_to(mount) and len(mount.parts) >= len(deepest.parts):
            deepest, kind = mount, rest.split()[0]
    if kind in _OBJECT_STORES:
        raise CheckpointError(
            f"{printable(resolved)}: lies on {kind} ({printable(deepest)}), where a folder cannot appear in one "
            "step: write to another disk, and copy"
        )


@contextmanager
def held(path: Path, busy: str, *, notify: Callable[[str], None] | None = None, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock at `path`, in a folder that exists, while the block runs.

    `busy` begins the UsageError where a live process holds it, unless `wait`. `notify` is told when it is waited for an
    owner on another machine, and when the lock of one that is gone was taken over. Raises CheckpointError where the
    place cannot be written, or its file system does not rename folders.
    """
    _check_renames(path)
    lock = Lock(path)
    try:
        try:
            lock.take(busy, notify, wait)
        except OSError as error:
            raise write_error(path, error) from None
        yield lock
    finally:
        lock.release()


def lives(path: Path) -> bool | None:
    """Whether a process that lives holds the lock at `path`; None where that cannot be known from here."""
    there = _read(path)
    if there is None:
        return False
    gone = None if there[0] is None else there[0].gone()
    return None if gone is None else not gone


def beat_at(path: Path) -> int | None:
    """When its owner last renewed it, in nanoseconds by the clock of its file system; None without a lock."""
    there = _read(path)
    return None if there is None else there[1]


def check_ours(path: Path) -> None:
    """Raise CheckpointError where another process holds the lock at `path`: it took it over from this one."""
    there = _read(path)
    if there is not None and (there[0] is None or there[0].token not in _held):
        raise CheckpointError(
            f"{printable(path)}: is held by {there[0] or 'another process'}, so nothing more is written"
        )
