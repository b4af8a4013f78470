"""Work done ahead, in threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def ordered_map[T, R](work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Iterator[R]:
    """`map(work, items)` with up to `ahead` results in the making. An error is raised where its result is due.

    Closing the iterator (or an error) waits for what runs and drops the rest.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
