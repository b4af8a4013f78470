"""The signals by which a queue says that time is up.

Slurm sends them to every process of a job step, so also to those that a rank has started (W&B's service), which
know nothing of them and would die of them: `held_back` is how those are started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


# A launcher passes Ctrl-C on to ranks that the terminal has told already: so soon it is the same one. Seconds.
_SAME_INTERRUPT = 2.0


class StopSignal:
    """True once SIGTERM or SIGUSR1 has come. A context manager; only the main thread can listen."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[int, Any] = {}
        self._interrupted_at: float | None = None

    def __bool__(self) -> bool:
        return self._came

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._interrupted_at is not None

    @contextlib.contextmanager
    def noting_interrupts(self) -> Iterator[None]:
        """In the block the first Ctrl-C is such a signal too; one more interrupts at once, as everywhere else."""

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._came, self._interrupted_at = True, now
                # Not print: the interrupted code may be in the middle of one.
                os.write(2, b"\nstopping with a checkpoint; Ctrl-C again leaves at once, without\n")
            elif now - self._interrupted_at > _SAME_INTERRUPT:
                raise KeyboardInterrupt

        try:
            before = signal.signal(signal.SIGINT, note)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
