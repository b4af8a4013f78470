"""What the loop asks of data: one stream of microbatches per data-parallel rank, which knows its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bridge.geometry import Geometry
from recipes.config import Recipe
from recipes.data.blend import Samples


class BatchStream(Protocol):
    """Microbatches without end, as dictionaries of tensors.

    `input_ids`, `labels` (shifted already, -100 where there is no loss), int64 [b, s]; as needed `attention_mask`
    [b, s] (1 = real), `position_ids` [b, s], `cu_seqlens` [documents + 1], `mm_token_type_ids` [b, s].

    The state is a small dictionary for JSON. It is the same on every data-parallel rank whenever all of them have
    taken the same number of microbatches, and it can be loaded at another number of ranks: what it says is how far
    the whole run is, in samples.
    """

    def __next__(self) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# Sets by their names ("": the only one). A call begins one: microbatches, as many on every rank.
Evaluation = Mapping[str, Callable[[], Iterator[dict[str, Tensor]]]]


@dataclass(frozen=True)
class AnswerBatches:
    """The answers of a set of data; `batches` begins one round of them, in which `sample_ids` number them (of
    preferences), or `label_ids` their labels."""

    samples: Samples
    batches: Callable[[], Iterator[dict[str, Tensor]]]


@dataclass(frozen=True)
class Streams:
    """`evaluation`: what is evaluated on; `evaluated`, `trained`: the samples that it is made of, where they are known.

    `notes`: what has to be said of the data when a run starts. `facts`: what is known of it, for JSON; `rows` of an
    epoch among it. `answers`: what a reference or a teacher is asked for once; `ref_logps`: where
    it goes, float64 [1, samples] by the fingerprints of the samples, for batches that are made from then on; with KTO
    [2, samples], the second row of answers behind other prompts. `taught`: the same of a teacher (`Batches`).
    `sources`: the names of those of `train`, where there are several.
    """

    train: BatchStream
    evaluation: Evaluation = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    evaluated: Mapping[str, Samples] = field(default_factory=dict)
    answers: tuple[AnswerBatches, ...] = ()
    ref_logps: dict[str, np.ndarray] = field(default_factory=dict)
    trained: Samples | None = None
    taught: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


# (recipe, geometry, data-parallel rank, data-parallel size) -> streams
DataFactory = Callable[[Recipe, Geometry, int, int], Streams]
