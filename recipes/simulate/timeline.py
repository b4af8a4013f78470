"""From what ranks did to when: the events of all stages played against each other on a hardware profile.

Each rank has one queue of work. A collective of a group waits for those of the same group before it, and work goes on
until it is waited for. The other ranks of its group are taken to come to it at the same time: they do the same work.
What a stage receives is there when the stage that sends it has got so far: that is where bubbles come from.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.megatron.parallel import Parallel
from recipes.simulate.events import Collective, Event, Mark, SimulatedRank, Wait, Work
from recipes.simulate.hardware import Hardware

# What a collective of a group is for, by what Megatron calls the group; the first that is in it counts.
_PURPOSES = (
    ("EXPERT_TENSOR_AND_DATA", "data parallelism"),
    ("EXPERT_DATA", "data parallelism"),
    ("EXPERT", "expert parallelism"),
    ("DATA_PARALLEL", "data parallelism"),
    ("TENSOR_MODEL_PARALLEL", "tensor parallelism"),
    ("CONTEXT_PARALLEL", "context parallelism"),
    ("PIPELINE", "pipeline"),
)


class Span(NamedTuple):
    """A part of a rank's step, in seconds from its begin: forward, backward, update, or waiting for another stage."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class RankTime:
    """Seconds of one rank: `parts` of work by kind, of collectives that it waits for by purpose, and its `bubble`, in
    which it waits for other stages."""

    pp_rank: int
    spans: list[Span]
    parts: dict[str, float]
    bubble: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, which the slowest rank sets."""

    seconds: float
    ranks: tuple[RankTime, ...]

    @property
    def bubble(self) -> float:
        """The part of a step, of all stages, in which they wait for each other."""
        return sum(rank.bubble for rank in self.ranks) / (len(self.ranks) * self.seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds of a step go, mean of the stages; the most first."""
        total: defaultdict[str, float] = defaultdict(float)
        for rank in self.ranks:
            for name, seconds in (*rank.parts.items(), ("bubble", rank.bubble)):
                total[name] += seconds / len(self.ranks)
        return dict(sorted(((name, seconds) for name, seconds in total.items() if seconds), key=lambda each: -each[1]))


def step_time(ranks: Sequence[SimulatedRank], parallel: Parallel, microbatches: int, hardware: Hardware) -> StepTime:
    """Of a step with so many microbatches, of which `ranks` (one of each stage, in order) did as many or the fewest
    that show all (`fewest_microbatches`)."""
    clocks = [_Clock(rank, lengthened(rank, parallel, microbatches), hardware) for rank in ranks]
    posts: dict[tuple[int, int], deque[float]] = defaultdict(deque)
    while any(not clock.finished for clock in clocks):
        moved = [clock.advance(posts) for clock in clocks]
        if not any(moved):
            raise RuntimeError("stages wait for each other: what was sent does not match what is received")
    seconds = max(clock.now for clock in clocks)
    return StepTime(seconds, tuple(clock.result(seconds) for clock in clocks))


def lengthened(rank: SimulatedRank, parallel: Parallel, microbatches: int) -> list[Event]:
    """The events of a step with more microbatches: a round of the steady phase as often as it takes.

    A round is one forward and one backward pass; interleaved, those of pp microbatches in every chunk.
    """
    more = microbatches - rank.microbatches
    if more <= 0:
        return rank.events
    begins = [i for i, event in enumerate(rank.events) if isinstance(event, Mark) and event == Mark("forward", True)]
    pp, vpp = parallel.pp, parallel.vpp
    if vpp == 1:
        first, passes, rounds = pp - rank.pp_rank - 1, 1, more
    else:
        first, passes, rounds = 2 * (pp - rank.pp_rank - 1) + (vpp - 1) * pp, pp * vpp, more // pp
    start, stop = begins[first], begins[first + passes]
    events = rank.events[:stop]
    for repeat in range(1, rounds + 1):
        events += [_repeated(event, start, stop, repeat, rank.events) for event in rank.events[start:stop]]
    of_round = range(start, stop)
    tail = rank.events[stop:]
    return events + [
        event._replace(number=event.number + rounds * len(rank.events))
        if isinstance(event, Wait) and event.number in of_round
        else event
        for event in tail
    ]


def _repeated(event: Event, start: int, stop: int, repeat: int, events: list[Event]) -> Event:
    """An event of the `repeat`-th copy of a round. Numbers are places in `events`.

    What a copy waits for from before its round is what the copy before it began.
    """
    if not isinstance(event, Collective | Wait):
        return event
    number, step = event.number, len(events)
    if start <= number < stop:
        return event._replace(number=number + repeat * step)
    earlier = number + stop - start
    if start <= earlier < stop and isinstance(event, Wait):
        began = events[earlier]
        if isinstance(began, Collective) and began.kind == events[number].kind:  # type: ignore[union-attr]
            return event._replace(number=earlier + (repeat - 1) * step)
    return event


@dataclass
class _Clock:
    """One rank on its way through its events."""

    rank: SimulatedRank
    events: list[Event]
    hardware: Hardware
    now: float = 0.0
    _at: int = 0
    _busy: dict[str, float] = field(default_factory=dict)
    _ends: dict[int, float] = field(default_factory=dict)
    _purpose: dict[int, str] = field(default_factory=dict)
    _receives: dict[int, tuple[int, int]] = field(default_factory=dict)
    _received: Counter[int] = field(default_factory=Counter)
    _open: list[tuple[str, float]] = field(default_factory=list)
    _spans: list[Span] = field(default_factory=list)
    _parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _bubble: float = 0.0

    @property
    def finished(self) -> bool:
        return self._at == len(self.events)

    def advance(self, posts: dict[tuple[int, int], deque[float]]) -> bool:
        """Go on until something is waited for that another stage has not sent; whether anything was done.

        `posts`: when what one rank sent another arrives, in order.
        """
        before = self._at
        while not self.finished:
            event = self.events[self._at]
            if isinstance(event, Wait) and not self._wait(event.number, posts):
                break
            if isinstance(event, Work):
                for kind, seconds in self.hardware.work_seconds(event).items():
                    self._parts[kind] += seconds
                    self.now += seconds
            elif isinstance(event, Collective):
                self._begin(event, posts)
            elif isinstance(event, Mark):
                self._mark(event)
            self._at += 1
        return self._at > before

    def _begin(self, event: Collective, posts: dict[tuple[int, int], deque[float]]) -> None:
        rank = self.rank.rank
        self._purpose[event.number] = purpose_of(event)
        if event.kind == "recv":
            assert event.peer is not None
            self._receives[event.number] = event.peer, self._received[event.peer]
            self._received[event.peer] += 1
            return
        channel = f"{event.kind} {event.peer}" if event.kind == "send" else event.group.name
        start = max(self.now, self._busy.get(channel, 0.0))
        end = self._busy[channel] = start + self.hardware.collective_seconds(event, rank)
        self._ends[event.number] = end
        if event.kind == "send":
            assert event.peer is not None
            posts[rank, event.peer].append(end)

    def _wait(self, number: int, posts: dict[tuple[int, int], deque[float]]) -> bool:
        """Let the clock go to the end of a collective; False where that is not known yet."""
        if number in self._receives:
            peer, place = self._receives[number]
            arrivals = posts[peer, self.rank.rank]
            if place >= len(arrivals):
                return False
            arrival = arrivals[place]
            if arrival > self.now:
                self._bubble += arrival - self.now
                self._spans.append(Span("waiting", self.now, arrival))
                self.now = arrival
            return True
        end = self._ends.get(number, self.now)
        if end > self.now:
            self._parts[self._purpose[number]] += end - self.now
            self.now = end
        return True

    def _mark(self, event: Mark) -> None:
        if event.begins:
            self._open.append((event.name, self.now))
        else:
            name, start = self._open.pop()
            self._spans.append(Span(name, start, self.now))

    def result(self, step: float) -> RankTime:
        """Behind its last event a rank waits for the slowest."""
        bubble = self._bubble + step - self.now
        return RankTime(self.rank.pp_rank, self._spans, dict(self._parts), bubble)


def purpose_of(event: Collective) -> str:
    """Which kind of parallelism a collective belongs to."""
    if event.kind in ("send", "recv"):
        return "pipeline"
    if event.group.name == "default_pg":
        return "sums of the step"
    return next((purpose for text, purpose in _PURPOSES if text in event.group.name.upper()), "other collectives")


def collectives(events: Sequence[Event]) -> Iterator[Collective]:
    """Those of a step."""
    return (event for event in events if isinstance(event, Collective))
