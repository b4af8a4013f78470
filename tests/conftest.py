"""What all tests share."""

from __future__ import annotations

import gc
import signal


def pytest_configure() -> None:
    """Take Ctrl-C: a shell ignores it for what it starts in the background, and tests send it to what they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again, each time that it runs."""
    gc.collect()
    gc.freeze()
