"""Factories for Megatron's sharded state dicts, where one parameter is several boxes of a checkpoint tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

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


def without_padding(item: ShardedTensor | ShardedTensorFactory, rows: int) -> ShardedTensor | ShardedTensorFactory:
    """A table that is cut over ranks along its first axis, as checkpoints hold it: its first `rows` rows.

    What is loaded has zeros behind them. Megatron lets tables of other shapes pass, because its own are stored with
    their padding; these have one shape, whatever the layout.
    """
    whole = item

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        if isinstance(whole, ShardedTensorFactory):
            boxes = whole.build_fn(key, tensor, replica_id, flattened_range)
        else:
            boxes = [replace(whole, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica_id)]
        return [_first_rows(box, rows) for box in boxes]

    @torch.no_grad()
    def merge(parts: Sequence[Tensor]) -> Tensor:
        filled = [fill_up(part, (local_rows, *part.shape[1:])) for part in parts]
        return whole.merge_fn(filled) if isinstance(whole, ShardedTensorFactory) else filled[0]

    first = item.build()[0] if isinstance(item, ShardedTensorFactory) else item
    local_rows = first.local_shape[0]
    if first.global_shape[0] == rows:
        return replace(item, allow_shape_mismatch=False) if isinstance(item, ShardedTensor) else item
    return ShardedTensorFactory(item.key, item.data, build, merge, item.replica_id)


def _first_rows(box: ShardedTensor, rows: int) -> ShardedTensor:
    part = box.data[: max(0, rows - box.global_offset[0])]
    return replace(
        box,
        data=part,
        local_shape=tuple(part.shape),
        global_shape=(rows, *box.global_shape[1:]),
        axis_fragmentations=None,  # the last rank has fewer rows
        allow_shape_mismatch=False,
    )


def fill_up(part: Tensor, shape: Sequence[int]) -> Tensor:
    """`part` with zeros behind it, up to `shape`."""
    if tuple(part.shape) == tuple(shape):
        return part
    whole = part.new_zeros(tuple(shape))
    whole[tuple(slice(size) for size in part.shape)] = part
    return whole
