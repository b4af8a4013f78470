"""Batches of records -> parts of a cache: in this process, and where that takes long in others beside it."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

from bridge.errors import DataError
from recipes.data.cache import CacheParts, write_part
from recipes.data.chat import ChatModel
from recipes.data.encoding import INVALID, Encoder, RecordOutcome
from recipes.data.garbage import seldom_collected
from recipes.data.media import read_blob
from recipes.data.options import CorpusOptions
from recipes.data.processes import Processes
from recipes.data.processing import ReadMedia
from recipes.data.record_batches import RecordBatch
from recipes.data.record_sources import RecordSource
from recipes.data.sample import Blob, Media
from recipes.data.statistics import Statistics
from recipes.data.threads import ordered_map

# Other processes take seconds to start: they are begun when this one has worked so long, and it works on meanwhile.
_ALONE_S = 5.0
# What a process does at a time takes about so long, or is so many batches: it is what an end of the run may cost, and
# how long the last process may work alone.
_GROUP_S, _GROUP_BATCHES = 1.0, 32

# The number of a source, and consecutive records of it.
Numbered = tuple[int, RecordBatch]


class RecordEncoder:
    """What is done to records, in whichever process. `roots`: the folder of the media of each source."""

    def __init__(self, chat: ChatModel, options: CorpusOptions, roots: Sequence[Path | None]) -> None:
        self._encoder, self._options, self._roots = Encoder(chat, options), options, roots

    def outcomes(self, source: int, batch: RecordBatch, skip: int = 0) -> Iterator[RecordOutcome]:
        """What each record gives, in order, behind the first `skip`. Raises UsageError where it is due."""
        records = list(islice(batch.records(), skip, None))
        fetched: list[dict[str, bytes]] = [{} for _ in records]
        reads = [self._reader(self._roots[source], of_record) for of_record in fetched]
        for outcome, of_record in zip(self._encoder.outcomes(records, reads), fetched, strict=True):
            yield _with_fetched(outcome, of_record) if of_record else outcome

    def part(self, folder: Path, group: Sequence[Numbered]) -> WrittenPart:
        """Write a part of them all, up to the first error where that ends the run. Raises OSError, UsageError."""
        said: list[str] = []
        error: DataError | None = None

        def outcomes() -> Iterator[tuple[int, RecordOutcome]]:
            nonlocal error
            for source, batch in group:
                for outcome in self.outcomes(source, batch):
                    if outcome.error is not None and self._options.on_error == "fail":
                        error = outcome.error
                        return
                    if outcome.reason == INVALID:
                        said.append(outcome.message)
                    yield source, outcome

        place = Path(tempfile.mkdtemp(prefix="new-", dir=folder))
        records, statistics = write_part(place, outcomes())
        return WrittenPart(place, records, statistics, tuple(said), error)

    def _reader(self, root: Path | None, fetched: dict[str, bytes]) -> ReadMedia:
        allow_urls = self._options.allow_urls

        def read(blob: Blob, at: str) -> bytes:
            if blob.url is None:
                return read_blob(blob, root, allow_urls=allow_urls, at=at)
            if blob.url not in fetched:
                fetched[blob.url] = read_blob(blob, root, allow_urls=allow_urls, at=at)
            return fetched[blob.url]

        return read


@dataclass(frozen=True)
class WrittenPart:
    """A part that a process has written. `skipped`: its bad records; `error`: the one that ends the run."""

    place: Path
    records: int
    statistics: Statistics
    skipped: tuple[str, ...]
    error: DataError | None


def tokenise(
    parts: CacheParts,
    chat: ChatModel,
    options: CorpusOptions,
    sources: Sequence[RecordSource],
    progress: Callable[[int, float], None],
    notify: Callable[[str], None],
) -> None:
    """Add what is not in `parts` yet. Raises DataError for a bad record, with `on_error="fail"`; OSError."""
    if parts.records:
        notify(f"tokenising goes on behind the {parts.records} records of an interrupted run")
    roots = [Path(options.media_root) if options.media_root is not None else source.root for source in sources]
    share = ReadShare(sources)
    batches = _behind(sources, parts.records)
    with seldom_collected(), ExitStack() as stack:
        processes: Processes | None = None
        try:
            clock = _Clock(parts.records)
            work, read = RecordEncoder(chat, options, roots), parts.records
            for source, batch, skip in batches:
                done = share.read(source)
                for outcome in work.outcomes(source, batch, skip):
                    if outcome.error is not None and options.on_error == "fail":
                        raise outcome.error
                    parts.add(source, outcome)
                    read += 1
                    if outcome.reason == INVALID:
                        notify(f"skipped {outcome.message}")
                    progress(read, done)
                clock.reached(read)
                if processes is None and options.workers > 1 and clock.seconds >= _ALONE_S:
                    settings = (chat.folder, options, roots, parts.folder)
                    processes = stack.enter_context(Processes(options.workers, "recipes.data.worker", settings))
                if processes is not None and processes.ready:
                    break
        finally:
            parts.flush()
        if processes is not None:
            groups = groups_of(((source, batch) for source, batch, _ in batches), clock.speed)
            with_processes(parts, processes, options.workers, groups, progress, notify, share)


class _Clock:
    """How fast records are worked on, but for those of the first batch, whose time is that of what is imported."""

    def __init__(self, records: int) -> None:
        self._records, self._since, self._last = records, 0.0, 0.0
        self.speed = 1.0

    @property
    def seconds(self) -> float:
        return self._last - self._since

    def reached(self, records: int) -> None:
        """So many records are done."""
        self._last = time.monotonic()
        if not self._since:
            self._records, self._since = records, self._last
        self.speed = max(1.0, (records - self._records) / max(self.seconds, 1e-3))


def with_processes(
    parts: CacheParts,
    processes: Processes,
    workers: int,
    groups: Iterator[Sequence[Numbered]],
    progress: Callable[[int, float], None],
    notify: Callable[[str], None],
    share: ReadShare,
) -> None:
    """Each process makes a part at a time; here they are put into their order. Raises DataError."""
    # Of the groups that are being worked on, how much of the data was read with them.
    shares: deque[float] = deque()

    def noted() -> Iterator[Sequence[Numbered]]:
        for group in groups:
            shares.append(share.read(group[-1][0]))
            yield group

    with closing(ordered_map(processes.ask, noted(), workers=workers, ahead=2 * workers)) as results:
        for made in results:
            if made.error is not None:
                raise made.error
            parts.take(made.place, made.records, made.statistics)
            for message in made.skipped:
                notify(f"skipped {message}")
            progress(parts.records, shares.popleft())


class ReadShare:
    """Which part of all data has been read, 0 to 1, while its sources are read one after another."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = sources
        self._sizes = [source.size() for source in sources]
        self._before = [0, *accumulate(self._sizes)]

    def read(self, source: int) -> float:
        """As far as the source of this number has been read."""
        whole = max(1, self._before[-1])
        return (self._before[source] + self._sizes[source] * self._sources[source].share) / whole


def _behind(sources: Sequence[RecordSource], behind: int) -> Iterator[tuple[int, RecordBatch, int]]:
    """Batches with the number of their source, and how many of a batch's records are among the first `behind`."""
    for number, source in enumerate(sources):
        for batch in source.record_batches():
            if behind < len(batch):
                yield number, batch, behind
            behind = max(0, behind - len(batch))


def groups_of(batches: Iterator[Numbered], speed: float) -> Iterator[Sequence[Numbered]]:
    """Batches that one process takes at a time; `speed`: records a second."""
    group: list[Numbered] = []
    for numbered in batches:
        group.append(numbered)
        if len(group) >= _GROUP_BATCHES or sum(len(batch) for _, batch in group) >= speed * _GROUP_S:
            yield group
            group = []
    if group:
        yield group


def _with_fetched(outcome: RecordOutcome, fetched: dict[str, bytes]) -> RecordOutcome:
    """The outcome with bytes in place of URLs: training never goes to the network."""

    def stored(blob: Blob) -> Blob:
        return blob if blob.url is None else Blob(data=fetched[blob.url])

    def local(item: Media) -> Media:
        return replace(item, blobs=tuple(stored(blob) for blob in item.blobs))

    encoded = tuple(replace(item, media=tuple(local(media) for media in item.media)) for item in outcome.encoded)
    return replace(outcome, encoded=encoded)
