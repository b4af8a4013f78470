"""A few threads that take tasks in order, each with its own buffers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence


def parallel[T, R](tasks: Sequence[T], make_worker: Callable[[], Callable[[T], R]], workers: int) -> Iterator[R]:
    """Run the tasks in `workers` threads, started in order; yields results as they come, in the calling thread.

    Each thread makes its own worker, and with it its buffers. The first error, an interrupt in the calling thread, or
    closing the iterator stops all threads, each after the task that it is at.
    """
    results: queue.SimpleQueue[tuple[R | None, BaseException | None, bool]] = queue.SimpleQueue()
    lock, stop, pending = threading.Lock(), threading.Event(), iter(tasks)

    def run() -> None:
        try:
            work = make_worker()
            while not stop.is_set():
                with lock:
                    task = next(pending, None)
                if task is None:
                    break
                results.put((work(task), None, False))
        except BaseException as error:
            stop.set()
            results.put((None, error, False))
        finally:
            results.put((None, None, True))

    count = max(1, min(workers, len(tasks))) if tasks else 0
    threads = [threading.Thread(target=run, name=f"copy-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        running = count
        while running:
            result, error, ended = results.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            else:
                yield result  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
