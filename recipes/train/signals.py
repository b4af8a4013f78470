"""The signals by which a queue says that time is up.

Slurm sends them to every process of a job step, so also to those that a rank has started (W&B's service), which
know nothing of them and would die of them: `held_back` is how those are started.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """True once SIGTERM or SIGUSR1 has come. A context manager; only the main thread can listen."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._came

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ignore_from_now_on(self) -> None:
        """For a process that is about to end: srun signals the ranks that outlive the first one that stopped, and
        Python lets go of its handlers before it is gone."""
        for number in self._before:
            self._before[number] = signal.SIG_IGN

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Stop signals come when the block is left; processes that are started in it never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # Whose start lets SIGTERM through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
