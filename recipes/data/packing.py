"""Which samples stand together in a row, and in which order the rows of an epoch come.

A plan is a pure function of the lengths, the options and the epoch's number: every rank makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bridge.errors import DataError


@dataclass(frozen=True)
class PackingPlan:
    """The rows of one epoch: row i holds the samples `order[starts[i]:starts[i + 1]]`.

    `efficiency`: real tokens in all that the rows hold; None where rows are not packed.
    """

    order: np.ndarray
    starts: np.ndarray
    efficiency: float | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> list[int]:
        """The samples of a row."""
        samples: list[int] = self.order[self.starts[index] : self.starts[index + 1]].tolist()
        return samples


def plan_epoch(
    lengths: np.ndarray,
    *,
    epoch: int,
    seed: int,
    shuffle: bool,
    packing: bool,
    seq_length: int,
    document_multiple: int = 1,
    pack_buffer: int = 4096,
    source: int = 0,
) -> PackingPlan:
    """Plan an epoch over samples of `lengths` [n], or [n, k] of which the k of a row of it stay in one row.

    `source`: its number among several, each of which has an order of its own.

    With packing, the shuffled samples are taken `pack_buffer` at a time and packed into rows of `seq_length`, each
    sample rounded up to `document_multiple`; a buffer's rows are shuffled again, or long samples would always come
    first. Raises DataError for a sample that no row holds.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch, source] if source else [seed, epoch]))
    order = generator.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    lengths = lengths.reshape(len(lengths), -1)
    if not packing:
        return _of_samples(order, np.arange(len(order) + 1), lengths.shape[1], None)
    sizes = (-(-lengths // document_multiple) * document_multiple).sum(1)
    if len(sizes) and int(sizes.max()) > seq_length:
        raise DataError(
            f"a sample of {int(lengths.sum(1).max())} tokens, padded to a multiple of {document_multiple}, is longer "
            f"than a row of {seq_length}; tokenise with a smaller seq_length"
        )
    rows: list[list[int]] = []
    for start in range(0, len(order), pack_buffer):
        chosen = order[start : start + pack_buffer]
        packed = first_fit_decreasing(sizes[chosen].tolist(), seq_length)
        if shuffle:
            packed = [packed[index] for index in generator.permutation(len(packed))]
        rows += [[int(chosen[index]) for index in row] for row in packed]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    flat = np.asarray([sample for row in rows for sample in row], np.int64)
    return _of_samples(flat, starts, lengths.shape[1], float(lengths.sum()) / max(1, len(rows) * seq_length))


def _of_samples(order: np.ndarray, starts: np.ndarray, together: int, efficiency: float | None) -> PackingPlan:
    """A plan of samples from one of groups of so many."""
    samples = (order[:, None] * together + np.arange(together)).flatten()
    return PackingPlan(samples, starts * together, efficiency)


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins: the longest first, each into the first bin with room. Returns the items of every bin.

    Ties keep the order of the items, so that the result depends on nothing else. Raises ValueError for an item that is
    larger than a bin.
    """
    bins: list[list[int]] = []
    # Room of every bin; those not opened yet are empty, so an item that fits nowhere opens the next one.
    room = np.full(len(sizes), capacity, np.int64)
    for item in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if sizes[item] > capacity:
            raise ValueError(f"item {item} of size {sizes[item]} does not fit into {capacity}")
        place = int(np.argmax(room[: len(bins) + 1] >= sizes[item]))
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins
