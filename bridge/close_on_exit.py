"""What is closed at the end of a `with`."""

from __future__ import annotations

from typing import Self


class CloseOnExit:
    """A context manager whose end is its `close`."""

    def close(self) -> None:
        """Give back what is held. Safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
