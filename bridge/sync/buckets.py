"""What is sent, and in which pieces: names, shapes and dtypes are known before the first tensor is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

# Of a bucket, where nothing else is said: one Megatron tensor of any published model but E2B's and E4B's table of
# per-layer embeddings fits.
BUCKET_BYTES = 1 << 30


@dataclass(frozen=True)
class SyncTensor:
    """A tensor on its way. `name`: in a Hugging Face checkpoint (an adapter's: in its format). `megatron`: its key."""

    name: str
    megatron: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


# The tensors that one Megatron tensor consists of: gathered together, and sent together.
Group = tuple[SyncTensor, ...]


@dataclass(frozen=True)
class Bucket:
    """Tensors that lie behind each other in one buffer, without gaps: wider dtypes first, so that all are aligned."""

    tensors: tuple[SyncTensor, ...]

    @property
    def nbytes(self) -> int:
        """Of the buffer."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer (uint8 [nbytes] or longer), by name."""
        found, offset = {}, 0
        for tensor in self.tensors:
            part = buffer[offset : offset + tensor.nbytes]
            found[tensor.name] = part.view(tensor.dtype).view(tensor.shape)
            offset += tensor.nbytes
        return found


def plan_buckets(groups: Iterable[Sequence[SyncTensor]], bucket_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Buckets of whole groups in their order, of `bucket_bytes` at most.

    A group that is larger is a bucket by itself: engines load whole tensors.
    """
    filled: list[list[SyncTensor]] = []
    room = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if not filled or size > room:
            filled.append([])
            room = bucket_bytes
        filled[-1] += group
        room -= size
    return tuple(Bucket(tuple(sorted(tensors, key=lambda t: -t.dtype.itemsize))) for tensors in filled)


def with_siblings(groups: Sequence[Group], trained: Set[str]) -> list[Group]:
    """The groups of the Megatron tensors `trained`, and those that an engine loads with them.

    An engine that reloads a layer wants all of it. What it computes in one (q, k and v; gate and up) is one Megatron
    tensor, and so one group; the parameters of one module (both of the experts) are groups with a common parent.
    """
    parents: dict[str, set[str]] = defaultdict(set)
    for tensor in (tensor for group in groups for tensor in group):
        parents[tensor.megatron].add(tensor.name.rpartition(".")[0])
    found = trained & parents.keys()
    while True:
        reached = set().union(*(parents[key] for key in found))
        more = {key for key, of in parents.items() if of & reached}
        if more == found:
            return [group for group in groups if group[0].megatron in found]
        found = more
