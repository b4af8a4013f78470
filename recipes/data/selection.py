"""Some of the samples of a corpus, as a corpus of their own: rows held out from training, the first few rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from bridge.errors import DataError
from recipes.data.chat import Encoded
from recipes.data.corpus import Corpus
from recipes.data.sample import Where


class SelectedSamples:
    """The `samples` (int64, in order) of a corpus. What is not said here is as in `Corpus`."""

    def __init__(self, corpus: Corpus, samples: np.ndarray) -> None:
        self.corpus, self.samples = corpus, samples
        self.folder, self.options = corpus.folder, corpus.options
        self.pad_id, self.has_media, self.tokenizer = corpus.pad_id, corpus.has_media, corpus.tokenizer
        which = hashlib.sha256(samples.tobytes()).hexdigest()[:16]
        self.fingerprint = f"{corpus.fingerprint}/{which}"
        self.inputs = {**corpus.inputs, "the part that data.val_fraction and max_samples leave": which}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 [samples]."""
        lengths: np.ndarray = self.corpus.lengths[self.samples]
        return lengths

    def where(self, sample: int) -> Where:
        """The file and line that a sample comes from."""
        return self.corpus.where(int(self.samples[sample]))

    def __getitem__(self, sample: int) -> Encoded:
        return self.corpus[int(self.samples[sample])]

    def media_tensors(self, sample: int) -> dict[str, Any]:
        """As the processor makes them. Raises DataError."""
        return self.corpus.media_tensors(int(self.samples[sample]))


# The samples of one corpus.
CorpusSamples = Corpus | SelectedSamples


def underlying_corpus(samples: CorpusSamples) -> Corpus:
    """The corpus that samples are of."""
    return samples.corpus if isinstance(samples, SelectedSamples) else samples


def first_samples(corpus: CorpusSamples, count: int) -> CorpusSamples:
    """The first `count` samples (of pairs so many pairs); all, where `count` is 0 or there are no more."""
    count *= corpus.options.together
    return corpus if not count or count >= len(corpus) else _selected(corpus, np.arange(count, dtype=np.int64))


def _selected(samples: CorpusSamples, which: np.ndarray) -> SelectedSamples:
    return (
        SelectedSamples(samples.corpus, samples.samples[which])
        if isinstance(samples, SelectedSamples)
        else SelectedSamples(samples, which)
    )


def held_out(corpus: CorpusSamples, fraction: float) -> tuple[SelectedSamples, SelectedSamples]:
    """(the rest, about `fraction` of the samples): by the content of records alone, whatever their order or a seed.

    Pieces of one record, and records that say the same, are on the same side. Raises DataError where nothing would be
    left of either side.
    """
    starts, digests = underlying_corpus(corpus).records(
        corpus.samples if isinstance(corpus, SelectedSamples) else np.arange(len(corpus), dtype=np.int64)
    )
    order = np.lexsort(digests.T[::-1])
    sizes = np.diff(starts, append=len(corpus))[order]
    # Those that say the same, the least digest first, until there are enough.
    alike = np.cumsum(np.r_[False, (np.diff(digests[order], axis=0) != 0).any(1)])
    together = np.bincount(alike, sizes).astype(np.int64)
    taken = np.cumsum(together) - together < max(1, round(fraction * len(corpus)))
    if taken.all():
        raise DataError(
            f"{', '.join(corpus.options.paths)}: data.val_fraction={fraction:g} of {len(corpus)} samples "
            f"({len(taken)} different ones) leaves none to train on"
        )
    records = np.empty(len(order), bool)
    records[order] = taken[alike]
    chosen = records.repeat(np.diff(starts, append=len(corpus)))
    return _selected(corpus, np.flatnonzero(~chosen)), _selected(corpus, np.flatnonzero(chosen))
