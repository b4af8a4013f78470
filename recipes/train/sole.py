"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.convert.lock import check_ours, held
from bridge.hf.tensors import write_error

_LOCK = ".run.lock"


@contextmanager
def sole_run(output: str | Path, rank: int, notify: Callable[[str], None] | None = None) -> Iterator[None]:
    """Make the output folder of a run and hold it for this process, on rank 0; elsewhere nothing.

    A folder made here that is still empty in the end goes again. `notify` is told of a lock that a run left behind.
    Raises UsageError (another run is writing it) and CheckpointError (it cannot be made).
    """
    if rank:
        yield
        return
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        with held(folder / _LOCK, f"output={output}: another run is writing it right now", notify=notify):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def check_sole(output: Path) -> None:
    """Raise CheckpointError where another run has taken the folder over: this one was thought to be gone."""
    check_ours(output / _LOCK)
