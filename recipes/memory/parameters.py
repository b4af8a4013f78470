"""How many parameters each rank holds: the mapping tables' shard axes, and which stage a tensor lives on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bridge.geometry import Geometry
from bridge.mapping.table import DECODER, Entry, Table
from bridge.megatron.layout import stage_layers
from bridge.megatron.parallel import Parallel

Trained = Callable[[Entry], bool]


def everything(entry: Entry) -> bool:
    """What a run trains that freezes nothing: towers and projectors too."""
    return True


def nothing(entry: Entry) -> bool:
    """The model of a run that trains its drafter, which the estimate leaves out: its own is some hundredths of it."""
    return False


@dataclass(frozen=True)
class ParameterCounts:
    """Elements on one rank. Experts are counted apart: other ranks hold copies of them than of the rest.

    `largest`: of its trained tensors, whose gradient exists twice for a moment.
    """

    dense: int = 0
    experts: int = 0
    frozen: int = 0
    buffers: int = 0
    largest: int = 0

    @property
    def trained(self) -> int:
        return self.dense + self.experts

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def stages_of_rank(geometry: Geometry, parallel: Parallel, pp_rank: int) -> list[tuple[int, range]]:
    """The stages, with their layers, of the chunks that a pipeline rank holds."""
    stages = stage_layers(geometry.num_layers, parallel.pp * parallel.vpp)
    return [(number, stages[number]) for number in range(pp_rank, len(stages), parallel.pp)]


def count(table: Table, parallel: Parallel, pp_rank: int, trained: Trained = everything) -> ParameterCounts:
    """The elements of one pipeline rank, any of its tensor-parallel and expert-parallel ranks (all are alike)."""
    last = parallel.pp * parallel.vpp - 1
    dense = experts = frozen = buffers = largest = 0
    for number, layers in stages_of_rank(table.geometry, parallel, pp_rank):
        for entry in table.entries.values():
            copies = _copies(entry, table, number, layers, last)
            if not copies:
                continue
            numel = _local(entry, parallel, len(layers) / table.geometry.num_layers)
            if not entry.row.trainable:
                buffers += numel
            elif not trained(entry):
                frozen += numel
            elif "ep" in entry.row.shard:
                experts += numel
            else:
                dense += numel
            if entry.row.trainable and trained(entry):
                largest = max(largest, numel)
    return ParameterCounts(dense, experts, frozen, buffers, largest)


def _copies(entry: Entry, table: Table, number: int, layers: range, last: int) -> bool:
    """Whether stage `number` of 0 to `last` holds the tensor, or a part of it."""
    if entry.row.stack is not DECODER:
        return number == 0
    if entry.layer is not None:
        return entry.layer.index in layers
    if entry.key.startswith("decoder.ple."):
        return True
    if entry.key.startswith("embedding."):
        # A tied head on another stage than the embedding is a copy of it.
        return number == 0 or (number == last and table.geometry.tied and entry.key.endswith(".weight"))
    return number == last


def _local(entry: Entry, parallel: Parallel, layer_share: float) -> int:
    """Elements of this rank's part of a tensor. `layer_share`: of an axis that stages split, layer by layer."""
    ways = {"tp": parallel.tp, "ep": parallel.ep, "etp": parallel.etp}
    sizes = list(entry.shape)
    for axis, group in enumerate(entry.row.shard):
        if group in ways:
            sizes[axis] = -(-sizes[axis] // ways[group])  # a vocabulary is filled up to equal parts
    numel = math.prod(sizes)
    return round(numel * layer_share) if "pp" in entry.row.shard else numel
