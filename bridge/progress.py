"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bridge.convert.stream import Progress as Callback

# Seconds between plain lines: a log of an hour's conversion stays readable.
_LINE_EVERY_S = 15.0
# Seconds between looks at what ranks say.
_POLL_S = 0.2


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


@contextmanager
def followed(say: Callable[[str], object]) -> Iterator[Path]:
    """A file whose lines are said as they are written to it: ranks write to it, whose own output is a log."""
    with tempfile.TemporaryDirectory(prefix="gemma4-bridge-") as folder:
        path, ended = Path(folder) / "progress", threading.Event()
        path.touch()

        def follow() -> None:
            with path.open(encoding="utf-8") as file:
                last = False
                while not last:
                    last = ended.wait(_POLL_S)  # what came before the end is said too
                    for line in file.read().splitlines():
                        say(line)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            ended.set()
            thread.join()
