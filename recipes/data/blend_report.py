"""What is said of several sources before the first step: how much there is of each, and how much of it the run sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.data.blend import BlendSource, described
from recipes.data.order import Order


@dataclass(frozen=True)
class SourceUse:
    """Of a source: its samples, tokens, and rows of its first epoch, and rows of it that the run takes.

    `repeated`: how often the run sees it. `unused`: rows that it never sees.
    """

    name: str
    share: str
    samples: int
    tokens: int
    rows: int
    taken: int

    @property
    def repeated(self) -> float:
        return self.taken / self.rows

    @property
    def unused(self) -> int:
        return max(0, self.rows - self.taken)


def uses(sources: Sequence[BlendSource], order: Order, rows: int) -> list[SourceUse]:
    """Of each source, in a run of so many rows. Where epochs have other numbers of rows (packing) after the first."""
    counts = order.counts(order.start().places)
    whole, rest = divmod(rows, sum(counts))
    last = np.bincount(order.interleaved(0, counts)[:rest], minlength=len(counts))
    return [
        SourceUse(
            source.name,
            " ".join(described(source.share)),
            len(source.samples) // source.samples.options.together,
            int(source.samples.lengths.sum()),
            plans.rows(0),
            int(whole * count + more),
        )
        for source, plans, count, more in zip(sources, order.plans, counts, last, strict=True)
    ]


def lines(found: Sequence[SourceUse]) -> Iterator[str]:
    """In words."""
    total = sum(use.taken for use in found)
    for use in found:
        left = ""
        if use.unused:
            left = f", {use.unused} rows (about {round(use.unused / use.rows * use.tokens)} tokens) are not used"
        share = f" ({use.share})" if use.share else ""
        yield (
            f"  source {use.name}{share}: {use.samples} samples, {use.tokens} tokens, {use.rows} rows; the run takes "
            f"{use.taken} rows ({use.taken / total:.1%}), {use.repeated:.3g} times all of them{left}"
        )


def to_json(found: Sequence[SourceUse]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {
            "name": use.name,
            "share": use.share,
            "samples": use.samples,
            "tokens": use.tokens,
            "rows": use.rows,
            "rows_of_the_run": use.taken,
            "repeated": round(use.repeated, 4),
            "unused_rows": use.unused,
        }
        for use in found
    ]
