"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bridge.convert.stream import Progress as Callback

# Seconds between plain lines: a log of an hour's conversion stays readable.
_LINE_EVERY_S = 15.0


@contextmanager
def shown_progress(console: Console, title: str) -> Iterator[Callback]:
    """A callback `(bytes done, bytes in all, tensor)` that shows itself on `console`."""
    if console.is_terminal:
        text = TextColumn("{task.description}")
        columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, name: bar.update(task, completed=done, total=total)
        return
    started = last = time.monotonic()

    def line(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            rate = done / max(now - started, 1e-9) / 1e9
            console.print(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate:.2f} GB/s, {name}")

    yield line
