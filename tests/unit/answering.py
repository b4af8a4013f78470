"""What a process of `test_data_processes` does."""

from __future__ import annotations

from collections.abc import Callable


def opened() -> Callable[[int], int]:
    return lambda number: number + 1
