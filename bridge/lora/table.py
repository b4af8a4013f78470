"""The table of a model's adapters, derived from the table of its weights.

For every Megatron tensor that has an adapted Hugging Face tensor in it there are entries, under the key of the
weight without `.weight`:

    KEY.lora_A  [n · r, in]    the A's of its n adapted tensors, one below the other
    KEY.lora_B  [out, r]       the rows of their B's, arranged as the weight's rows are

and with DoRA `KEY.lora_magnitude` [out], arranged like B; `[E, r, in]`, `[E, out, r]` for experts; for an embedding
[rows, hidden] the factors lie as the weight does, and are PEFT's transposed: A [rows, r], B [r, hidden] (and magnitudes
[hidden]). A weight of `modules_to_save` is in the table as it is in that of the weights.

r is the largest rank in the tensor: smaller ones are filled up with rows and columns of zeros, which get no gradient
and stay zero. Rows of B that belong to a tensor without an adapter are zeros as well. This table's Hugging Face tensors
are named `TENSOR.lora_A` and so on after the weight's name on disk; the filling is part of them, and `peft_view`
takes it off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bridge.errors import UsageError
from bridge.lora.spec import Factor, Target
from bridge.mapping.table import ADAPTERS, Entry, HfTensor, Shard, Table
from bridge.mapping.transforms import RowBlock, Shape

# Where adapters come from: (target, part) -> a tensor of the shape `target.shape_of(part)`, without filling.
Values = Callable[[Target, Factor], Tensor]


@dataclass(frozen=True)
class Adapted:
    """A Megatron tensor with adapters: its entry, and the target of each of its sources that has one."""

    weight: Entry
    targets: Mapping[int, Target]

    @property
    def rank(self) -> int:
        """The largest rank of its targets, to which the others are filled up."""
        return max(target.rank for target in self.targets.values())

    @property
    def experts(self) -> bool:
        """Whether the weight is [experts, out, in]."""
        return len(self.weight.shape) == 3

    @property
    def embedding(self) -> bool:
        """Whether the weight is looked up by row."""
        return self.weight.row.embedding

    @property
    def saved(self) -> bool:
        """Whether the weight has no adapter, but is trained itself."""
        return self.parts == ("weight",)

    @property
    def parts(self) -> tuple[Factor, ...]:
        """The tensors that its targets have."""
        return self.targets[self.order[0]].parts

    @property
    def order(self) -> tuple[int, ...]:
        """The adapted sources, in the order of their A's."""
        return tuple(sorted(self.targets))


@dataclass(frozen=True)
class AdapterTable(Table):
    """A table whose tensors are adapters. `adapted`: by the Megatron key of the weight."""

    adapted: Mapping[str, Adapted]

    @property
    def targets(self) -> Iterator[Target]:
        """All targets, in the order of the table."""
        for adapted in self.adapted.values():
            for source in adapted.order:
                yield adapted.targets[source]

    def covers(self, key: str) -> bool:
        """See `Table.covers`."""
        return key in self.entries or key.endswith(ADAPTERS)

    def factors(self) -> AdapterTable:
        """The table without the weights that are trained themselves."""
        adapted = {key: each for key, each in self.adapted.items() if not each.saved}
        entries = {entry.key: entry for each in adapted.values() for entry in _entries(each)}
        return AdapterTable(self.geometry, entries, {}, {}, adapted)


def adapter_table(table: Table, targets: Sequence[Target]) -> AdapterTable:
    """The table of adapters for `targets`. Raises UsageError for a target that is no matrix of the model."""
    held: dict[str, dict[int, Target]] = {}
    for target in targets:
        entry, source = table.by_hf_name.get(target.name, (None, 0))
        fits = target.kind == "saved" or (entry is not None and len(entry.shape) in (2, 3))
        if entry is None or not fits or not entry.row.trainable:
            raise UsageError(f"{target.name}: no weight of this model that can have an adapter")
        held.setdefault(entry.key, {})[source] = target
    adapted = {key: Adapted(entry, held[key]) for key, entry in table.entries.items() if key in held}
    entries = {entry.key: entry for each in adapted.values() for entry in _entries(each)}
    return AdapterTable(table.geometry, entries, {}, {}, adapted)


def part_name(name: str, part: Factor) -> str:
    """The name of one tensor of the adapter of the HF tensor `name`, in an adapter table."""
    return name if part == "weight" else f"{name}.lora_{part}"


def peft_view(tensor: Tensor, target: Target, part: Factor) -> Tensor:
    """A tensor of the table, or rows of it, without its filling and turned as PEFT has it: a view."""
    if part in ("magnitude", "weight"):
        return tensor
    if target.kind == "embedding":
        return tensor.T
    return tensor.narrow(-2 if part == "A" else -1, 0, target.rank)


def canonical(entry: Entry, index: int, whole: Tensor, target: Target, part: Factor) -> Tensor:
    """Of a tensor of the table, all of it, the part of one target as PEFT has it; `index`: which of its sources."""
    rows = [whole[block.row : block.row + block.num_rows] for block in entry.blocks if block.source == index]
    return peft_view(torch.cat(rows), target, part).contiguous()


def _entries(adapted: Adapted) -> Iterator[Entry]:
    weight, order = adapted.weight, adapted.order
    if adapted.saved:
        yield weight
        return
    key = weight.key.removesuffix(".weight")
    for part in adapted.parts:
        shape, shard, shapes, blocks = _layout(adapted, part)
        names = (part_name(adapted.targets[source].name, part) for source in order)
        sources = tuple(HfTensor(name, shape) for name, shape in zip(names, shapes, strict=True))
        row = replace(weight.row, shard=shard)
        yield replace(weight, key=f"{key}.lora_{part}", shape=shape, sources=sources, blocks=blocks, row=row)


def _layout(adapted: Adapted, part: Factor) -> tuple[Shape, Shard, list[Shape], tuple[RowBlock, ...]]:
    """Of one Megatron tensor: its shape, how it is split, the shapes of its sources and the blocks of their rows."""
    weight, rank, order = adapted.weight, adapted.rank, adapted.order
    shape, shard = weight.shape, weight.row.shard
    if adapted.embedding:
        if part == "A":
            return (shape[0], rank), (shard[0], None), [(shape[0], rank)], weight.blocks
        if part == "B":
            return (rank, shape[1]), (None, shard[1]), [(rank, shape[1])], (RowBlock(0, 0, 0, rank),)
        return shape[1:], shard[1:], [shape[1:]], (RowBlock(0, 0, 0, shape[1]),)
    if adapted.experts:
        experts, rows, columns = shape
        if part == "A":
            shape, shard = (experts, rank, columns), (shard[0], None, shard[2])
        else:
            shape, shard = (experts, rows, rank), (shard[0], shard[1], None)
        return shape, shard, [shape] * len(order), weight.blocks
    if part == "A":
        shapes: list[Shape] = [(rank, shape[1])] * len(order)
        blocks = tuple(RowBlock(number * rank, number, 0, rank) for number in range(len(order)))
        return (len(order) * rank, shape[1]), (None, shard[1]), shapes, blocks
    # As the rows of the weight are: of B [out, r], or of magnitudes [out].
    columns_of: Shape = (rank,) if part == "B" else ()
    return (
        (shape[0], *columns_of),
        (shard[0], None)[: 1 + len(columns_of)],
        [(weight.sources[source].shape[0], *columns_of) for source in order],
        tuple(replace(block, source=order.index(block.source)) for block in weight.blocks if block.source in order),
    )
