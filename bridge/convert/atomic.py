"""A target folder that is complete or absent, and a conversion that goes on where it was interrupted.

All work happens in `.NAME.partial` beside the target NAME: `data/` becomes the target by one rename when everything in
it is on the disk; `journal.jsonl` records the files that are finished. One process at a time (`bridge.convert.lock`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.convert.lock import Lock, held
from bridge.convert.replace import check_replaceable, recover, replace_folder, sync_tree
from bridge.errors import CheckpointError, UsageError
from bridge.hf.tensors import fsync_folder, printable, write_error

Notify = Callable[[str], None]
_JOURNAL = "journal.jsonl"
_DATA = "data"
_OLD = "old"
_VERSION = 1
# What the journal is called while folders are exchanged.
_SWAPPING = "journal.swapping"


class Journal:
    """The finished files of a conversion and the CRC32 of their chunks. Every record is durable before it counts."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.finished: dict[str, tuple[int, ...]] = {}
        valid = self._load(fingerprint)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._fd, valid)
        if not valid:
            self._append({"version": _VERSION, "fingerprint": fingerprint})

    def _load(self, fingerprint: str) -> int:
        """Read what an earlier run recorded; the bytes of it that are valid (0: none, or another conversion's)."""
        try:
            lines = self.path.read_bytes().split(b"\n")
            head = json.loads(lines[0])
            if head != {"version": _VERSION, "fingerprint": fingerprint}:
                return 0
        except (OSError, ValueError, RecursionError):
            return 0
        valid = len(lines[0]) + 1
        # Behind the last newline there is nothing, or a record that the interruption cut off.
        for line in lines[1:-1]:
            try:
                entry = json.loads(line)
                self.finished[str(entry["file"])] = tuple(int(crc) for crc in entry["crcs"])
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            valid += len(line) + 1
        return valid if len(lines) > 1 else 0

    def record(self, file: str, crcs: Sequence[int]) -> None:
        """Note that a file is finished. Raises CheckpointError."""
        self._append({"file": file, "crcs": list(crcs)})
        self.finished[file] = tuple(crcs)

    def _append(self, entry: Mapping[str, object]) -> None:
        try:
            os.write(self._fd, (json.dumps(entry) + "\n").encode())
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(self.path, error) from None

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Stage:
    """A conversion under way: write into `folder`, hand `journal` to `bridge.convert.stream.copy`."""

    target: Path
    folder: Path
    journal: Journal


def source_fingerprint(plan: str, files: Iterable[Path]) -> str:
    """A digest of a plan (see `plan_digest`) and of the source files as they are now: path, size, time of change."""
    digest = hashlib.blake2b(plan.encode(), digest_size=20)
    for path in sorted(files):
        try:
            info = path.stat()
        except OSError as error:
            raise CheckpointError(f"{printable(path)}: cannot be read ({error.strerror})") from None
        digest.update(f"\n{path.resolve()}\0{info.st_size}\0{info.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def staged(
    target: str | Path,
    *,
    plan: str,
    sources: Sequence[Path],
    source_folder: Path | None = None,
    needed_bytes: int = 0,
    overwrite: bool = False,
    notify: Notify | None = None,
) -> Iterator[Stage]:
    """Make `target` complete or not at all.

    `plan` and the `sources` (files) identify the conversion: when an interrupted one is the same, its finished files
    are in the journal of the yielded stage. `needed_bytes` are checked against the free disk before anything is
    written. `notify` gets a line of text when work is resumed, begun afresh, or kept for the next run; it is a warning
    where nobody listens.

    When the block ends without an exception the folder is made durable and renamed to `target`; an existing target is
    exchanged for it and then removed. On an exception the target stays as it was; finished files are kept beside it.

    Raises UsageError (target exists, or lies in the source, or is being written by another process), CheckpointError
    (disk too small or full, source changed meanwhile).
    """
    say = notify or _warn
    # Not resolve(): a target that is a link is to be seen as one.
    path = Path.cwd() / target
    if source_folder is not None and path.name:
        check_apart(path, source_folder)
    check_target(path, overwrite, sources)
    fingerprint = source_fingerprint(plan, sources)
    _make_folder(path.parent)
    partial = path.parent / f".{path.name}.partial"
    busy = f"{printable(path)}: another process is writing it right now"
    with held(path.parent / f".{path.name}.lock", busy, notify=say) as lock:
        journal: Journal | None = None
        ours: os.stat_result | None = None
        try:
            with _write_errors(path):
                recover(path, partial / _OLD)
                check_target(path, overwrite, sources)
                journal = _open_journal(partial, fingerprint, say)
                _check_disk(path, partial, needed_bytes)
                stage = Stage(path, partial / _DATA, journal)
                stage.folder.mkdir(exist_ok=True)
                ours = stage.folder.stat()
                yield stage
                if source_fingerprint(plan, sources) != fingerprint:
                    journal.finished.clear()
                    raise CheckpointError(f"{printable(path)}: not written: the source changed while it was being read")
                _commit(stage, partial, overwrite, sources, lock)
                _discard(partial, say)
        except BaseException:
            # What stands there is another's where the lock was taken over.
            if lock.is_ours():
                _settle(partial, path, journal, ours, say)
            raise
        finally:
            if journal is not None:
                journal.close()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Whatever cannot be written for `path` (assets and config too) is one line that names the file."""
    try:
        yield
    except OSError as error:
        raise write_error(Path(error.filename or path), error) from None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def _commit(stage: Stage, partial: Path, overwrite: bool, sources: Iterable[Path], lock: Lock) -> None:
    """Make what was written durable, and the target."""
    sync_tree(stage.folder)
    # Again, because it may have appeared since.
    check_target(stage.target, overwrite, sources)
    lock.check()
    _replace(stage, partial)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def check_target(path: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raise UsageError where a target stands that may not be replaced. `sources`: files of names that come again."""
    if not path.name:
        raise UsageError(f"{printable(path)} cannot be a target")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{printable(path)}: exists and is not a folder")
    if next(path.iterdir(), None) is None:
        return
    if not overwrite:
        raise UsageError(f"{printable(path)}: exists; remove it, choose another, or pass --overwrite")
    check_replaceable(path, (source.name for source in sources))


def check_apart(target: Path, source: Path) -> None:
    """Raise UsageError where a target is a source, or one lies inside the other."""
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs:
        raise UsageError(f"{printable(target)}: is the source itself")
    if ours.is_relative_to(theirs):
        raise UsageError(f"{printable(target)}: lies inside the source {printable(source)}")
    if theirs.is_relative_to(ours):
        raise UsageError(f"{printable(target)}: the source {printable(source)} lies inside it")


def _open_journal(partial: Path, fingerprint: str, say: Notify) -> Journal:
    if partial.is_symlink():
        raise CheckpointError(f"{printable(partial)}: is a link, which is not followed; remove it")
    partial.mkdir(exist_ok=True)
    stale = (partial / _JOURNAL).exists() or (partial / _SWAPPING).exists()
    (partial / _SWAPPING).unlink(missing_ok=True)
    journal = Journal(partial / _JOURNAL, fingerprint)
    if journal.finished:
        say(f"resuming: {len(journal.finished)} files of an interrupted run are finished")
        return journal
    if stale and (partial / _DATA).exists():
        say("beginning afresh: an interrupted run with other input or options was found and is discarded")
    shutil.rmtree(partial / _DATA, ignore_errors=True)
    return journal


def _check_disk(target: Path, partial: Path, needed: int) -> None:
    have = 0
    for folder, _, names in os.walk(partial / _DATA):
        # Blocks, not sizes: an unfinished file is sparse.
        have += sum((Path(folder) / name).lstat().st_blocks * 512 for name in names)
    free = shutil.disk_usage(partial).free
    if needed - have > free:
        rest = f" ({_gb(have)} are there already)" if have else ""
        raise CheckpointError(f"{printable(target)}: needs {_gb(needed)} of disk{rest}, {_gb(free)} are free")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes / 1e6:.3f} MB"


def _replace(stage: Stage, partial: Path) -> None:
    # From here on no later run may take data/ for its own unfinished work: it may hold the old target.
    (partial / _JOURNAL).rename(partial / _SWAPPING)
    fsync_folder(partial)
    stage.journal.close()
    replace_folder(stage.folder, stage.target, partial / _OLD)


def _settle(partial: Path, path: Path, journal: Journal | None, ours: os.stat_result | None, say: Notify) -> None:
    """After an exception: `partial` goes, unless there is work in it to go on with, or a target not put back yet.

    `ours`: the folder that was being written, once there was one.
    """
    landed = _is_folder(path, ours)
    if journal is not None:
        # NFS keeps a file that is still open in its folder, under another name.
        journal.close()
    if (partial / _OLD).is_dir() and not os.path.lexists(path):
        return
    if not landed and journal is None and (partial / _JOURNAL).exists():
        return
    if not landed and journal is not None and journal.finished and (ours is None or _is_folder(partial / _DATA, ours)):
        with contextlib.suppress(FileNotFoundError):
            (partial / _SWAPPING).rename(partial / _JOURNAL)
        say(f"{len(journal.finished)} finished files are kept in {partial}: run the same command again to go on")
        return
    _discard(partial, say)
    if landed:
        say(f"{printable(path)}: is complete and in its place; the interruption came after that")


def _discard(partial: Path, say: Notify) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if os.path.lexists(partial):
        say(f"{printable(partial)}: cannot be removed; nothing in it is needed")


def _is_folder(path: Path, info: os.stat_result | None) -> bool:
    try:
        return info is not None and os.path.samestat(path.lstat(), info)
    except OSError:
        return False
