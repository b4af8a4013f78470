"""What one rank does in a step, in order: work, collectives, waits, and where passes begin and end; what it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from bridge.megatron.parallel import Parallel


class Group(NamedTuple):
    """A process group: what Megatron calls it, and the ranks of the world in it."""

    name: str
    ranks: tuple[int, ...]


class Work(NamedTuple):
    """What a device computes between two other events: FLOPs by kind, bytes that other kernels read and write, kernels.

    `products`: of matrices; `experts`: grouped ones; `attention`, and its backward pass: of pairs that see each other,
    as executed (the backward pass makes the scores again).
    """

    products: int = 0
    experts: int = 0
    attention: int = 0
    attention_backward: int = 0
    moved: int = 0
    kernels: int = 0


class Collective(NamedTuple):
    """`size`: bytes of the larger of a rank's buffers: what all_gather fills, what the others are given.

    `peer`: of send and recv, a rank of the world. `number`: what a `Wait` names.
    """

    kind: str
    group: Group
    size: int
    peer: int | None
    number: int


class Wait(NamedTuple):
    """The device waits for what a collective brings."""

    number: int


class Mark(NamedTuple):
    """A pass of a microbatch through a model chunk, or another part of the step, begins or ends."""

    name: str
    begins: bool


Event = Work | Collective | Wait | Mark


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `weights`, `gradients` and `optimizer` stay; `at_peak`: by kind, what is held beside them at
    the worst moment of the step, which is in its `moment`: passes or update."""

    weights: int
    gradients: int
    optimizer: int
    at_peak: dict[str, int]
    moment: str

    def with_batches(self, more: int, tokens: int) -> Memory:
        """With the batches of so many more microbatches, of `tokens` each, which are there as long as a step: ids,
        labels, documents, places and what has a label, in int64 each."""
        return replace(self, at_peak=self.at_peak | {"batches": more * tokens * 5 * 8})

    @property
    def persistent(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """At the worst moment, beside what stays."""
        return sum(self.at_peak.values())

    @property
    def total(self) -> int:
        return self.persistent + self.peak


@dataclass(frozen=True)
class SimulatedRank:
    """What a rank did in a step of `microbatches`. `peaks`: bytes beside what stays, by moment: passes, update."""

    rank: int
    pp_rank: int
    microbatches: int
    memory: Memory
    peaks: dict[str, int]
    events: list[Event]


def fewest_microbatches(parallel: Parallel, microbatches: int) -> int:
    """So many that a step has every phase of the schedule: what more of them add repeats (`timeline.py`).

    1F1B: the first stage sends pp - 1 microbatches off before its first backward pass, then does one of each in turn.
    Interleaved, 2 (pp - 1) + (vpp - 1) pp passes go before, and a round is of pp microbatches in vpp chunks.
    """
    if parallel.pp == 1:
        return min(microbatches, 2)
    wanted = parallel.pp + 1 if parallel.vpp == 1 else 3 * parallel.pp
    return min(microbatches, wanted)
