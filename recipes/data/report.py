"""What is said of a run's data before the first step: lines for people, and the same for programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from recipes.data.encoding import INVALID, LEFT_OUT, NOTHING, TOO_LONG
from recipes.data.options import CorpusOptions
from recipes.data.statistics import Statistics

Say = Callable[[str], None]

# What is lost is said with the key to change, from this part of all on.
_WORTH_SAYING = 0.01
_EVERY_S = 10.0
_FIRST_LINES = 5


class ProgressLines:
    """Lines now and then while records are tokenised, and for the first of those that are skipped."""

    def __init__(self, say: Say, doing: str = "tokenising") -> None:
        self._say, self._doing = say, doing
        self._last: float | None = None
        self._first = (0.0, 0.0)
        self._lines = 0

    def read(self, records: int, share: float | None = None) -> None:
        """So many records have been read, which is this part of all, 0 to 1."""
        now = time.monotonic()
        if self._last is None:
            self._say(self._doing)
            self._first = (now, share or 0.0)
        elif now - self._last < _EVERY_S:
            return
        else:
            self._say(f"{self._doing}: {records} records{self._left(now, share)}")
        self._last = now

    def _left(self, now: float, share: float | None) -> str:
        """How long it takes yet, by how long it took so far."""
        since, before = self._first
        if share is None or share <= before:
            return ""
        seconds = (now - since) * (1 - share) / (share - before)
        return f", {share:.0%}, about {_duration(seconds)} to go"

    def line(self, text: str) -> None:
        """A line of `open_corpus`."""
        self._lines += 1
        if self._lines <= _FIRST_LINES:
            self._say(text)


def _duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def facts(statistics: Statistics, options: CorpusOptions, files: list[str]) -> dict[str, Any]:
    """What became of the records, for JSON."""
    return {
        "files": files,
        "split": options.split,
        "format": formats(statistics),
        "unread": dict(statistics.unread),
        "read": statistics.read,
        "kept": statistics.kept,
        "dropped": dict(statistics.dropped),
        "pieces_dropped": statistics.pieces_dropped,
        "samples": statistics.samples,
        "tokens": statistics.tokens,
        "supervised": statistics.supervised,
        "thoughts_left_out": statistics.thoughts_left_out,
        "overlong": options.overlong,
    }


def formats(statistics: Statistics) -> str:
    """Which columns records have, the most frequent first."""
    return ", ".join(sorted(statistics.formats, key=lambda name: -statistics.formats[name]))


def unread(statistics: Statistics) -> str:
    """The columns that were not read, the most frequent first."""
    return ", ".join(sorted(statistics.unread, key=lambda name: -statistics.unread[name]))


def lines(statistics: Statistics, options: CorpusOptions, files: list[str]) -> Iterator[str]:
    """The same in words."""
    named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    dropped = ", ".join(f"{count} {reason}" for reason, count in statistics.dropped.items())
    yield f"data: {named} ({formats(statistics)})"
    if statistics.unread:
        yield f"  not read: {unread(statistics)} (data.columns says which column is which)"
    yield (
        f"  {statistics.read} records read, {statistics.kept} kept, "
        f"{f'dropped: {dropped}' if dropped else 'none dropped'}; {statistics.samples} samples, {statistics.tokens} "
        f"tokens, {statistics.supervised_fraction:.1%} of them learnt"
    )


def warnings(statistics: Statistics, options: CorpusOptions) -> list[str]:
    """What is lost, with the key to change: a line for everything that concerns more than a hundredth."""
    first = f"; the first: {statistics.skipped[0]}" if statistics.skipped else ""
    remedies = {
        TOO_LONG: f"longer than train.seq_length={options.seq_length}: raise it, or cut them with data.overlong=split",
        NOTHING: "without anything to learn: data.supervise_turns, data.supervise_thinking and "
        "data.supervise_tool_calls say what is",
        LEFT_OUT: "as data.function has it",
        INVALID: f"not readable as data.on_error=skip has it pass{first}",
    }
    found = []
    for reason, count in statistics.dropped.items():
        if count > _WORTH_SAYING * statistics.read:
            share = count / statistics.read
            found.append(f"{count} of {statistics.read} records ({share:.1%}) are left out, {remedies[reason]}")
    if statistics.pieces_dropped > _WORTH_SAYING * (statistics.samples + statistics.pieces_dropped):
        found.append(
            f"{statistics.pieces_dropped} pieces of split records are left out: one exchange is longer than "
            f"train.seq_length={options.seq_length}, or nothing in it is learnt"
        )
    if statistics.thoughts_left_out:
        found.append(
            f"{statistics.thoughts_left_out} thoughts of the data are not learnt: the chat template leaves them out "
            "(data.chat_template names another one)"
        )
    if statistics.unlike_prompts > _WORTH_SAYING * statistics.samples:
        found.append(
            f"{statistics.unlike_prompts} answers before the last are learnt without the empty thought that a model "
            "is asked with; data.supervise_turns=last learns the last ones alone"
        )
    return [f"warning: {line}" for line in found]
