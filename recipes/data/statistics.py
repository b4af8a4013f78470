"""What became of the records: read, kept, dropped and why, and how long the samples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Every record read is either kept or dropped for one reason: `read == kept + sum(dropped.values())`.

    `samples`: what the kept records gave (more than `kept` where long ones were split); `pieces_dropped`: parts of
    split records that were still too long, or taught nothing. `lengths`: upper bound of a length class -> samples in
    it. `media`: items by kind. `thoughts_left_out`: thoughts of the data that the template does not render.
    `unlike_prompts`: learnt answers before the last, which lack what a generation prompt puts before an answer.
    `formats`: records by the name of their format. `unread`: columns, and keys of messages, that were not read.
    `skipped`: the first errors, in words.
    """

    read: int
    kept: int
    samples: int
    dropped: Mapping[str, int]
    pieces_dropped: int
    blank_lines: int
    tokens: int
    supervised: int
    longest: int
    lengths: Mapping[int, int]
    media: Mapping[str, int]
    thoughts_left_out: int
    unlike_prompts: int
    formats: Mapping[str, int]
    unread: Mapping[str, int]
    skipped: tuple[str, ...]

    @property
    def supervised_fraction(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; `from_json` takes them back."""
        return asdict(self) | {"lengths": {str(bound): count for bound, count in self.lengths.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        """The statistics that `to_json` wrote."""
        lengths = {int(bound): count for bound, count in value["lengths"].items()}
        return cls(**{**value, "lengths": lengths, "skipped": tuple(value["skipped"])})


@dataclass
class StatisticsBuilder:
    """Statistics in the making."""

    read: int = 0
    kept: int = 0
    samples: int = 0
    pieces_dropped: int = 0
    blank_lines: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    thoughts_left_out: int = 0
    unlike_prompts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    # How many errors are kept in words; all of them are in the cache's skipped.txt.
    _SHOWN = 20

    def skip(self, reason: str, message: str) -> None:
        """Count a record that is dropped."""
        self.dropped[reason] += 1
        if len(self.skipped) < self._SHOWN:
            self.skipped.append(message)

    def add(self, lengths: np.ndarray, supervised: int) -> None:
        """Count samples of `lengths` tokens [n], int64, of which so many are learnt in all."""
        self.samples += len(lengths)
        self.tokens += int(lengths.sum())
        self.supervised += supervised
        self.longest = max(self.longest, int(lengths.max()))
        # The least power of two that holds it.
        classes = np.maximum(32, 1 << np.ceil(np.log2(lengths)).astype(np.int64))
        self.lengths.update(dict(zip(*(each.tolist() for each in np.unique(classes, return_counts=True)), strict=True)))

    def absorb(self, other: Statistics) -> None:
        """Count all that others have counted."""
        for name in ("read", "kept", "samples", "pieces_dropped", "blank_lines", "tokens", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.thoughts_left_out += other.thoughts_left_out
        self.unlike_prompts += other.unlike_prompts
        self.longest = max(self.longest, other.longest)
        for name in ("dropped", "formats", "unread", "lengths", "media"):
            getattr(self, name).update(getattr(other, name))
        self.skipped += other.skipped[: max(0, self._SHOWN - len(self.skipped))]

    def frozen(self) -> Statistics:
        """The statistics as counted so far."""
        return Statistics(
            read=self.read,
            kept=self.kept,
            samples=self.samples,
            dropped=dict(sorted(self.dropped.items())),
            pieces_dropped=self.pieces_dropped,
            blank_lines=self.blank_lines,
            tokens=self.tokens,
            supervised=self.supervised,
            longest=self.longest,
            lengths=dict(sorted(self.lengths.items())),
            media=dict(sorted(self.media.items())),
            thoughts_left_out=self.thoughts_left_out,
            unlike_prompts=self.unlike_prompts,
            formats=dict(sorted(self.formats.items())),
            unread=dict(sorted(self.unread.items())),
            skipped=tuple(self.skipped),
        )
