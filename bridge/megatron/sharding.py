"""Factories for Megatron's sharded state dicts, where one parameter is several boxes of a checkpoint tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor

# (axis, which fragment, of how many)
Offset = tuple[int, int, int]


def split_parameter(
    key: str,
    parameter: Tensor,
    dim: int,
    offsets: Callable[[int], Sequence[Offset]],
    pieces: int,
    replica_id: ReplicaId,
) -> ShardedTensorFactory:
    """A parameter whose `pieces` equal parts along `dim` lie at `offsets(i)` of the checkpoint tensor `key`."""

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(key, part, *offsets(i), replica_id=replica_id)
            for i, part in enumerate(tensor.chunk(pieces, dim=dim))
        ]

    @torch.no_grad()
    def merge(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=dim)

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)
