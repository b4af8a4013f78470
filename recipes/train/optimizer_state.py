"""The state of Megatron's distributed optimizer, whole parameter by whole parameter.

Each data-parallel rank holds an arbitrary flat piece of a parameter's moments (and of its float32 copy, where the
model is bf16). A checkpoint that loads in any layout must store them as the parameter is stored. So one rank of each
data-parallel group, another for every parameter in turn, collects the pieces and saves them with the sharding of the
parameter itself; loading goes the same way back. No rank holds more than its share of the whole, and no padding, bucket
or rank count enters the checkpoint: Megatron's own `fully_reshardable` format loses its place after the first padded
bucket, and its others are bound to the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from bridge.convert.live import METADATA
from recipes.train.host_memory import empty

_MOMENTS = ("exp_avg", "exp_avg_sq")
# The float32 copy of a parameter; a float32 parameter is its own.
_MAIN = "param"


@dataclass(frozen=True)
class _Held:
    """A parameter, the flat range of it that each data-parallel rank holds, and the rank that saves it."""

    parameter: Tensor
    ranges: tuple[tuple[int, int], ...]
    owner: int

    @property
    def keys(self) -> tuple[str, ...]:
        return _MOMENTS if self.parameter.dtype is torch.float32 else (_MAIN, *_MOMENTS)


def _parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    """Dense parameters and experts have optimizers, and data-parallel groups, of their own."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            yield part


def _held(part: DistributedOptimizer) -> list[_Held]:
    """Every parameter of the optimizer, in an order that the ranks of its group share."""
    parameters = [parameter for buffer in part.buffers for parameter in buffer.params]
    mine = []
    for parameter in parameters:
        span = part._get_model_param_range_map(parameter)["param"] if parameter in part.model_param_gbuf_map else None
        mine.append((0, 0) if span is None else (span.start, span.end))
    group = part.data_parallel_group
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    ranges = zip(*everyone, strict=True)
    return [
        _Held(parameter, spans, number % group.size())
        for number, (parameter, spans) in enumerate(zip(parameters, ranges, strict=True))
    ]


def sharded_state(
    optimizer: MegatronOptimizer, models: Sequence[torch.nn.Module], *, fill: bool
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """What this rank saves or loads, by a name of its own. Collective; with `fill`, the values are collected.

    The tensors are on the CPU, of the shapes of whole parameters (of this rank's tensor-parallel shard): copies, or the
    optimizer's own where this rank has all of a parameter's (`live_tensors`).
    """
    shardings = _shardings(models)
    result: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for number, part in enumerate(_parts(optimizer)):
        rank = part.data_parallel_group.rank()
        for index, held in enumerate(_held(part)):
            values = _collect(part, held) if fill else None
            if held.owner != rank:
                continue
            for key in held.keys:
                data = torch.empty(held.parameter.numel()) if values is None else values[key]
                item = _like(shardings[id(held.parameter)], key, data.view(held.parameter.shape))
                result[f"{number}.{index}.{key}"] = item
    return result


@torch.no_grad()
def set_state(optimizer: MegatronOptimizer, loaded: dict[str, Tensor], updates: Callable[[Tensor | None], int]) -> None:
    """Hand out what was loaded under the names of `sharded_state`. Collective.

    `updates`: how many Adam has made of a parameter; of None: of most.
    """
    for number, part in enumerate(_parts(optimizer)):
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's Adam counts per group
                group["step"] = updates(None)
        rank = part.data_parallel_group.rank()
        for index, held in enumerate(_held(part)):
            mine = held.owner == rank
            whole = {key: loaded[f"{number}.{index}.{key}"].flatten() for key in held.keys} if mine else None
            piece = _hand_out(part, held, whole)
            if piece is None:
                continue
            state = part._get_main_param_and_optimizer_states(held.parameter)
            if _MAIN not in piece:
                # The optimizer's parameter is the model's own, which the weights of the checkpoint have filled.
                piece[_MAIN] = state[_MAIN].detach().clone()
            if "step" in state:
                # Torch's Adam counts per parameter; one tensor for all would be incremented once for each of them.
                piece["step"] = torch.tensor(float(updates(held.parameter)))
            part._set_main_param_and_optimizer_states(held.parameter, piece)


def live_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """What an update changes of this rank's state."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for piece in group["params"]:
                yield piece
                yield from (each for each in part.optimizer.state.get(piece, {}).values() if isinstance(each, Tensor))


def make_states(optimizer: MegatronOptimizer) -> None:
    """Let moments exist before the first step. Weights may decay: load them afterwards."""
    for part in _parts(optimizer):
        part._init_optimizer_states_with_dummy_values()


def _shardings(models: Sequence[torch.nn.Module]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """How each parameter is stored, by its id."""
    return {
        id(item.data): item
        for model in models
        for item in model.sharded_state_dict(metadata=dict(METADATA)).values()  # type: ignore[operator]
        if isinstance(item, ShardedTensor | ShardedTensorFactory)
    }


def _like(item: ShardedTensor | ShardedTensorFactory, key: str, data: Tensor) -> ShardedTensor | ShardedTensorFactory:
    """`data`, stored as `item` is. The last number of a replica id is the data-parallel rank: here one rank has it."""
    changed: dict[str, Any] = {
        "key": f"optimizer.state.{key}.{item.key}",
        "data": data,
        "replica_id": (*item.replica_id[:-1], 0),
    }
    if isinstance(item, ShardedTensor):
        changed["dtype"] = data.dtype
    return replace(item, **changed)


def _collect(part: DistributedOptimizer, held: _Held) -> dict[str, Tensor] | None:
    """The whole state of a parameter on its owner, float32, flat, on the CPU; None elsewhere.

    Where the owner has it so, that is what it gets, and no copy. Else one tensor of it after the other: all of them,
    once more, may be more than a GPU has left.
    """
    group = part.data_parallel_group
    rank = group.rank()
    start, stop = held.ranges[rank]
    if rank != held.owner:
        for value in _state(part, held) if start < stop else ():
            dist.send(value.detach().float(), group=group, group_dst=held.owner)
        return None
    if (start, stop) == (0, held.parameter.numel()):
        own = [value.detach() for value in _state(part, held)]
        if all(value.device.type == "cpu" and value.dtype is torch.float32 and value.is_contiguous() for value in own):
            return dict(zip(held.keys, own, strict=True))
    whole = [empty(held.parameter.numel(), torch.float32) for _ in held.keys]
    for source, (low, high) in enumerate(held.ranges):
        if low == high:
            continue
        values = _state(part, held) if source == rank else _received(part, high - low, source, len(held.keys))
        for row, value in zip(whole, values, strict=True):
            row[low:high].copy_(value.detach())
    return dict(zip(held.keys, whole, strict=True))


def _received(part: DistributedOptimizer, length: int, source: int, count: int) -> Iterator[Tensor]:
    """`count` float32 tensors [length] of another rank, in the order in which it sends them."""
    for _ in range(count):
        piece = torch.empty(length, device=torch.cuda.current_device())
        dist.recv(piece, group=part.data_parallel_group, group_src=source)
        yield piece


def _state(part: DistributedOptimizer, held: _Held) -> Iterator[Tensor]:
    """This rank's piece of a parameter's state, by its keys; zeros for moments that no update has made yet."""
    group, place = part.model_param_group_index_map[held.parameter]
    piece = part.optimizer.param_groups[group]["params"][place]
    begun = bool(part.optimizer.state.get(piece))
    state = part._get_main_param_and_optimizer_states(held.parameter) if begun else {_MAIN: piece}
    return (state[key] if key in state else torch.zeros_like(piece, dtype=torch.float32) for key in held.keys)


def _hand_out(part: DistributedOptimizer, held: _Held, whole: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The inverse of `_collect`: this rank's piece, None where it holds none."""
    group = part.data_parallel_group
    rank = group.rank()
    start, stop = held.ranges[rank]
    device = torch.cuda.current_device()
    received = None
    if whole is not None:
        for target, (low, high) in enumerate(held.ranges):
            if low == high:
                continue
            pieces = {key: whole[key][low:high] for key in held.keys}
            if target != rank:
                for piece in pieces.values():
                    dist.send(piece.to(device), group=group, group_dst=target)
            # Transformer Engine's Adam takes them apart on the GPU; elsewhere they are copied to where they belong.
            elif part.config.use_precision_aware_optimizer:
                received = {key: piece.to(device) for key, piece in pieces.items()}
            else:
                received = pieces
    elif start < stop:
        received = dict(zip(held.keys, _received(part, stop - start, held.owner, len(held.keys)), strict=True))
    return received
