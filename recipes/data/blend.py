"""Several sources of samples as one, each of which keeps its name and the share that is taken of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recipes.data.chat import Encoded
from recipes.data.order import ALL, Share
from recipes.data.sample import Where
from recipes.data.selection import CorpusSamples


@dataclass(frozen=True)
class BlendSource:
    """`number`: its place in `data.sources`, which its own order depends on."""

    name: str
    samples: CorpusSamples
    share: Share = ALL
    number: int = 0


class Blend:
    """The samples of sources, one source behind the other. What is not said here is as in `Corpus`."""

    def __init__(self, sources: Sequence[BlendSource]) -> None:
        self.sources = tuple(sources)
        every = [source.samples for source in sources]
        self.folder, self.pad_id, self.tokenizer = every[0].folder, every[0].pad_id, every[0].tokenizer
        self.has_media = any(samples.has_media for samples in every)
        paths = tuple(path for samples in every for path in samples.options.paths)
        self.options = replace(every[0].options, path=paths)
        self._ends = np.cumsum([len(samples) for samples in every])
        self.inputs = _inputs(self.sources)
        which = " ".join(samples.fingerprint for samples in every)
        self.fingerprint = which if len(every) == 1 else hashlib.sha256(which.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64 [samples]."""
        return np.concatenate([source.samples.lengths for source in self.sources])

    def first(self, source: int) -> int:
        """The first sample of a source."""
        return int(self._ends[source - 1]) if source else 0

    def place(self, sample: int) -> tuple[int, int]:
        """The number of a sample's source here, and of the sample in it."""
        source = int(np.searchsorted(self._ends, sample, side="right"))
        return source, sample - self.first(source)

    def where(self, sample: int) -> Where:
        """The file and line that a sample comes from."""
        source, index = self.place(sample)
        return self.sources[source].samples.where(index)

    def __getitem__(self, sample: int) -> Encoded:
        source, index = self.place(sample)
        return self.sources[source].samples[index]

    def media_tensors(self, sample: int) -> dict[str, Any]:
        """As the processor makes them. Raises DataError."""
        source, index = self.place(sample)
        return self.sources[source].samples.media_tensors(index)


def _inputs(sources: Sequence[BlendSource]) -> dict[str, Any]:
    """What the tokens of sources were made of: by the source, where that is not the same for all."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for source in sources for name in source.samples.inputs):
        values = {source.name: source.samples.inputs.get(name) for source in sources}
        first, *others = values.values()
        if others and any(value != first for value in others):
            found |= {f"{source}: {name}": value for source, value in values.items()}
        else:
            found[name] = first
    return found


Samples = CorpusSamples | Blend


def blend_of(samples: Samples) -> Blend:
    """Samples of one corpus are the only source of theirs."""
    return samples if isinstance(samples, Blend) else Blend([BlendSource("", samples)])


def described_shares(sources: Sequence[BlendSource]) -> str | None:
    """What is taken of each source, in words; None where there is one, epoch by epoch."""
    if len(sources) == 1 and sources[0].share == ALL:
        return None
    return ", ".join(" ".join([source.name, *described(source.share)]) for source in sources)


def described(share: Share) -> list[str]:
    """A share as `data.sources` says it."""
    said = (
        f"weight={share.weight:g}" if share.weight is not None else "",
        f"tokens={share.tokens}" if share.tokens is not None else "",
        f"repeat={share.repeat}" if share.repeat > 1 else "",
    )
    return [each for each in said if each]
