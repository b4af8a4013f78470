"""In which order rows come: those of a source epoch after epoch, and the rows of several sources between each other.

Each source has a stream of rows of its own, which depends on neither the other sources nor their shares: the blend only
says from which stream the next row is. So a source that is added at the end leaves the order within the others alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.data.packing import PackingPlan

_KEPT_PLANS = 3
# Smaller sources are planned in less time than a thread takes to begin.
_WORTH_A_THREAD = 1000
# Rows between two exact counts where sources have weights, which have no epoch together.
WEIGHTED_ROWS = 1 << 16
# Row k is of the source in whose part of [0, 1) the fraction of k times this lies. It was searched for: whatever the
# part, the rows of each of up to 8 data-parallel ranks, which take 1 to 16 at a time, have their share of it to
# 0.55 % of 10,000 rows of all ranks together. (The golden ratio, whose multiples by 48 lie near whole numbers: 5 %.)
_STEP = 0.216886584565554


@dataclass(frozen=True)
class Share:
    """How much of a source is taken: the part that `weight` is of all weights; or in every epoch as many of its rows as
    hold `tokens` tokens, or all of them `repeat` times."""

    weight: float | None = None
    tokens: int | None = None
    repeat: int = 1


# All of it, once.
ALL = Share()


class Plans:
    """The rows of one source, epoch after epoch: each epoch is planned by a thread while the one before it is used.

    `plan`: makes that of an epoch. `tokens`: of every sample. `fixed`: rows of every epoch, where their number is known
    without planning. `epochs`: how many there are. Thread-safe.
    """

    def __init__(
        self,
        plan: Callable[[int], PackingPlan],
        tokens: np.ndarray,
        *,
        fixed: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self._plan, self._tokens, self._fixed, self._epochs = plan, tokens, fixed, epochs
        self._plans: dict[int, Future[PackingPlan]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __getitem__(self, epoch: int) -> PackingPlan:
        """Raises DataError as `plan_epoch` does."""
        future, mine = self._asked(epoch)
        if mine:
            self._fill(future, epoch)
        return future.result()

    def prepare(self, epoch: int) -> None:
        """Have an epoch planned by the time that it is asked for."""
        if len(self._tokens) < _WORTH_A_THREAD or (self._epochs is not None and epoch >= self._epochs):
            return
        future, mine = self._asked(epoch)
        if mine:
            self.close()
            self._thread = threading.Thread(target=self._fill, args=(future, epoch), name="plan", daemon=True)
            self._thread.start()

    def _asked(self, epoch: int) -> tuple[Future[PackingPlan], bool]:
        """The plan of an epoch, and whether the caller has to make it."""
        with self._lock:
            if epoch in self._plans:
                return self._plans[epoch], False
            future = self._plans[epoch] = Future()
            for old in sorted(self._plans)[:-_KEPT_PLANS]:
                del self._plans[old]
            return future, True

    def _fill(self, future: Future[PackingPlan], epoch: int) -> None:
        try:
            future.set_result(self._plan(epoch))
        except BaseException as error:
            with self._lock:
                self._plans.pop(epoch, None)  # who asks again is told again
            future.set_exception(error)

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return len(self[epoch]) if self._fixed is None else self._fixed

    def row_tokens(self, epoch: int) -> np.ndarray:
        """Of every row of an epoch, int64 [rows]."""
        plan = self[epoch]
        found: np.ndarray = np.add.reduceat(self._tokens[plan.order], plan.starts[:-1])
        return found

    def advanced(self, place: tuple[int, int], rows: int) -> tuple[int, int]:
        """The place (epoch, row) so many rows behind another."""
        epoch, row = place[0], place[1] + rows
        while row >= (there := self.rows(epoch)):
            epoch, row = epoch + 1, row - there
        return epoch, row

    def close(self) -> None:
        """Wait for the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()


@dataclass(frozen=True)
class Position:
    """A place in the stream of rows: the next one to come is row `row` of epoch `epoch`.

    `places`: (epoch, row) of each source's own stream. `counts`: how many rows of each source the epoch has; none
    before its first row.
    """

    epoch: int
    row: int
    places: tuple[tuple[int, int], ...] = ((0, 0),)
    counts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Of a single source that is gone through epoch by epoch, the epoch and the row say all."""
        whole = {"epoch": self.epoch, "row": self.row}
        if self.places == ((self.epoch, self.row),):
            return whole
        return whole | {"places": [list(place) for place in self.places], "counts": list(self.counts)}


class Order:
    """The rows of several sources, interleaved by their shares. `seed`: of where the interleaving begins."""

    def __init__(self, plans: Sequence[Plans], shares: Sequence[Share], seed: int, epochs: int | None = None) -> None:
        self.plans, self.shares = plans, shares
        self._seed, self._epochs = seed, epochs
        # Of the epochs so far, and where the one behind them begins.
        self._rows: list[int] = []
        self._begun = self.start().places
        self._interleaved: tuple[tuple[int, tuple[int, ...]], np.ndarray] | None = None

    @property
    def weighted(self) -> bool:
        """Whether sources have weights, so that there is no epoch."""
        return self.shares[0].weight is not None

    def start(self) -> Position:
        """The first place."""
        return Position(0, 0, ((0, 0),) * len(self.plans))

    def position(self, state: Mapping[str, Any]) -> Position:
        """What `Position.to_json` wrote."""
        epoch, row = int(state["epoch"]), int(state["row"])
        if "places" not in state:
            counts = self.counts(((epoch, 0),)) if row else ()
            return Position(epoch, row, ((epoch, row),), counts)
        places = tuple((int(own_epoch), int(own_row)) for own_epoch, own_row in state["places"])
        return Position(epoch, row, places, tuple(map(int, state["counts"])))

    def said(self, position: Position) -> str:
        """A place, in words."""
        if self.weighted:
            return f"row {position.epoch * WEIGHTED_ROWS + position.row}"
        return f"row {position.row} of epoch {position.epoch + 1}"

    def counts(self, places: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """How many rows of each source an epoch has that begins at their `places`."""
        if self.weighted:
            return apportioned([share.weight or 0.0 for share in self.shares], WEIGHTED_ROWS)
        return tuple(map(_taken, self.plans, self.shares, places))

    def rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        while len(self._rows) <= epoch:
            counts = self.counts(self._begun)
            self._rows.append(sum(counts))
            every = zip(self.plans, self._begun, counts, strict=True)
            self._begun = tuple(plans.advanced(place, count) for plans, place, count in every)
        return self._rows[epoch]

    def ahead(self, count: int, position: Position) -> tuple[list[tuple[int, list[int]]], Position]:
        """So many rows from a place on (fewer where the data ends), and the place behind them.

        A row is the number of its source, and its samples there.
        """
        epoch, row, places, counts = position.epoch, position.row, list(position.places), position.counts
        rows: list[tuple[int, list[int]]] = []
        while len(rows) < count and (self._epochs is None or epoch < self._epochs):
            counts = counts or self.counts(places)
            sources = self.interleaved(epoch, counts)
            for source in sources[row : row + count - len(rows)].tolist():
                rows.append((source, self._next(source, places)))
                row += 1
            if row >= len(sources):
                epoch, row, counts = epoch + 1, 0, ()
        return rows, Position(epoch, row, tuple(places), counts)

    def _next(self, source: int, places: list[tuple[int, int]]) -> list[int]:
        """The samples of the next row of a source, whose place goes on."""
        plans, (epoch, row) = self.plans[source], places[source]
        plan = plans[epoch]
        plans.prepare(epoch + 1)
        places[source] = (epoch, row + 1) if row + 1 < len(plan) else (epoch + 1, 0)
        return plan.row(row)

    def interleaved(self, epoch: int, counts: tuple[int, ...]) -> np.ndarray:
        """The source of every row of an epoch, int64 [rows]: each as often as `counts` says, evenly spread."""
        if self._interleaved is None or self._interleaved[0] != (epoch, counts):
            self._interleaved = (epoch, counts), interleave(counts, self._seed, epoch)
        return self._interleaved[1]

    def close(self) -> None:
        """End the threads."""
        for plans in self.plans:
            plans.close()


def interleave(counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """int64 [sum(counts)]: every number of a source as often as `counts` says.

    Any run of rows, and the rows of any data-parallel rank among them, have the shares of the whole but for a few rows.
    """
    numbers = np.arange(len(counts)).repeat(counts)
    if len(counts) == 1:
        return numbers
    begin = np.random.Generator(np.random.PCG64([seed, epoch, len(counts)])).random()
    places = (np.arange(len(numbers)) * _STEP + begin) % 1
    found = np.empty_like(numbers)
    found[np.argsort(places, kind="stable")] = numbers
    return found


def apportioned(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` shared out by `weights`, whole numbers: the largest remainders are rounded up."""
    shares = np.asarray(weights, np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - int(counts.sum())]] += 1
    return tuple(counts.tolist())


def _taken(plans: Plans, share: Share, place: tuple[int, int]) -> int:
    """How many rows of a source an epoch takes that begins at a place of it."""
    epoch, row = place
    if share.tokens is None:
        return sum(plans.rows(epoch + number) for number in range(share.repeat))
    rows, left = 0, share.tokens
    while left > 0:
        behind = np.cumsum(plans.row_tokens(epoch)[row:])
        needed = int(np.searchsorted(behind, left)) + 1
        if needed <= len(behind):
            return rows + needed
        rows, left, epoch, row = rows + len(behind), left - int(behind[-1]), epoch + 1, 0
    return rows
