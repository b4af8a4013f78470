"""Work done ahead, in threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


def ordered_map[T, R](work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Generator[R]:
    """`map(work, items)` with up to `ahead` results in the making. An error is raised where its result is due.

    Closing the iterator (or an error) waits for what runs and drops the rest; an interrupt waits for nothing.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    pending: deque[Future[R]] = deque()
    wait = True
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
