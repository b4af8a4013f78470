"""A rendered conversation in segments that are tokenised each by itself, and what of each is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from recipes.data.supervision import Span

# Of a segment, in the place of the token up to which it is learnt.
NONE, ALL = -1, -2


def split_into_segments(text: str, spans: Sequence[Span], ends: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """The text in segments, cut where supervision begins, and of each which tokens are learnt: `NONE`, `ALL`, or those
    up to the first that is this one of `ends`, the tokens at which the model stops.

    In use, the prompt up to the answer is tokenised alone and the model goes on from there: a token that straddles
    the two would be one that it can never say. Behind a token at which it stops there is nothing to cut.
    """
    segments: list[str] = []
    learnt: list[int] = []
    position = 0
    for number, (start, end) in enumerate(spans):
        if start > position:
            segments.append(text[position:start])
            learnt.append(NONE)
        marker = next((marker for marker in ends if text.endswith(marker, start, end)), None)
        following = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        position = end if marker is None else following
        segments.append(text[start:position])
        learnt.append(ALL if marker is None else ends[marker])
    if position < len(text):
        segments.append(text[position:])
        learnt.append(NONE)
    return segments, learnt


@dataclass
class TokenArrays:
    """What was tokenised at a time, in arrays: `ids` int32 [n]; `supervised` bool [n] and `types` uint8 [n], zeros."""

    ids: np.ndarray
    supervised: np.ndarray
    types: np.ndarray
    highest: int
    _at: int = 0

    @classmethod
    def of(cls, tokens: Sequence[list[int]]) -> TokenArrays:
        """The tokens of all segments."""
        ids = np.fromiter(chain.from_iterable(tokens), np.int32)
        return cls(ids, np.zeros(len(ids), bool), np.zeros(len(ids), np.uint8), int(ids.max(initial=-1)))

    def next(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """So many of each, which come next."""
        which = slice(self._at, self._at + count)
        self._at += count
        return self.ids[which], self.supervised[which], self.types[which]


def mark_learnt(supervised: np.ndarray, tokens: Sequence[list[int]], learnt: Sequence[int]) -> None:
    """Say of the segments' tokens, bool [n], which are learnt, as `split_into_segments` has it."""
    at = 0
    for segment, which in zip(tokens, learnt, strict=True):
        if which != NONE:
            supervised[at : at + (len(segment) if which == ALL else segment.index(which) + 1)] = True
        at += len(segment)
