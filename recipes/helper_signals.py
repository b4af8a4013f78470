"""Signals in the processes that a run starts for itself: it decides when they end.

A queue signals every process of a job, a terminal every one of its group; the run hears it too, saves, and ends them.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """For the start of a process: it has the signals blocked from its first instruction, until it calls `unheard`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unheard() -> None:
    """In the process: let them come, and do nothing. Not ignored, which what it starts itself would inherit."""
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
