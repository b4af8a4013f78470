"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.errors import UsageError
from bridge.hf.tensors import write_error


@contextmanager
def sole_run(output: str | Path, rank: int) -> Iterator[None]:
    """Make the output folder of a run and hold it for this process, on rank 0; elsewhere nothing.

    The folder itself is the lock, which ends with the process, however that ends. A folder made here that is still
    empty in the end goes again. Raises UsageError (another run is writing it) and CheckpointError (it cannot be made).
    """
    if rank:
        yield
        return
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(held)
            raise UsageError(f"output={output}: another run is writing it right now") from None
        # A file system without locks: nothing to be done about it.
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()
        os.close(held)
