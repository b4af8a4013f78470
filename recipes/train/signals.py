"""The signals by which a queue says that time is up.

Between steps and while a checkpoint is written they are noted, and the loop ends. Where there is nothing to save
(data is read, a model built, a checkpoint loaded, a model exported) they end the work at once, as Ctrl-C does.

Slurm sends them to every process of a job step, so also to those that a rank has started (W&B's service), which
know nothing of them and would die of them: `held_back` is how those are started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The exit code of a run that a signal ended and that goes on when it is started again: «try again» in sysexits.h. The
# job script puts such a run back into the queue. And that of Ctrl-C, as shells have it.
STOPPED, INTERRUPTED = 75, 130


class Stopped(KeyboardInterrupt):
    """A signal came where there is nothing to save. Like Ctrl-C no `Exception`, which libraries catch."""


# A launcher passes Ctrl-C on to ranks that the terminal has told already: so soon it is the same one. Seconds.
_SAME_INTERRUPT = 2.0


class StopSignal:
    """True once SIGTERM or SIGUSR1 has come. A context manager; only the main thread can listen.

    `patience`: for a process that does nothing else. What takes longer to stop at once (a library that does not come
    back, or catches everything) is ended with the process, so many seconds after the signal.
    """

    def __init__(self, patience: float | None = None) -> None:
        self._came = self._raised = False
        self._at_once, self._noting = False, False
        self._patience = patience
        self._pipe: int | None = None
        self._before: dict[int, Any] = {}
        self._interrupted_at: float | None = None

    def __bool__(self) -> bool:
        return self._came

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._interrupted_at is not None

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
            if self._patience is not None:
                self._watch(self._patience)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal raises `Stopped`, but where it is `noted`."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """In the block signals are noted, whatever is around it, and so is the first Ctrl-C; one more interrupts."""

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._came, self._interrupted_at = True, now
                # Not print: the interrupted code may be in the middle of one.
                os.write(2, b"\nstopping with a checkpoint; Ctrl-C again leaves at once, without\n")
            elif now - self._interrupted_at > _SAME_INTERRUPT:
                raise KeyboardInterrupt

        before: Any = None
        self._noting = True
        with contextlib.suppress(ValueError):  # not the main thread
            before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            self._noting = False
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def ignore_from_now_on(self) -> None:
        """For a process that is about to end: srun signals the ranks that outlive the first one that stopped, and
        Python lets go of its handlers before it is gone."""
        for number in self._before:
            self._before[number] = signal.SIG_IGN

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        # Once: what is cleaned up then must not be cut off too.
        if self._at_once and not self._noting and not self._raised:
            self._raised = True
            raise Stopped

    def _watch(self, patience: float) -> None:
        """Python's handlers wait until the main thread is back in Python; what a signal writes into a pipe does not."""
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        self._pipe = theirs
        codes = dict.fromkeys(STOP_SIGNALS, STOPPED) | {signal.SIGINT: INTERRUPTED}

        def watch() -> None:
            # Signals are the main thread's, which may hold them back.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while said := os.read(ours, 1):
                number = said[0]
                if number in codes and not self._noting:
                    time.sleep(patience)
                    os.write(2, b"stopped: what was going on did not end by itself\n")
                    os._exit(codes[signal.Signals(number)])

        threading.Thread(target=watch, name="signals", daemon=True).start()


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
