"""The table of a model's adapters, derived from the table of its weights.

For every Megatron tensor that has an adapted Hugging Face tensor in it there are two entries, under the key of the
weight without `.weight`:

    KEY.lora_A  [n · r, in]    the A's of its n adapted tensors, one below the other
    KEY.lora_B  [out, r]       the rows of their B's, arranged as the weight's rows are

and `[E, r, in]`, `[E, out, r]` for experts. r is the largest rank in the tensor: smaller ones are filled up with rows
and columns of zeros, which get no gradient and stay zero. Rows of B that belong to a tensor without an adapter are
zeros as well. This table's Hugging Face tensors are named `TENSOR.lora_A` and `TENSOR.lora_B` after the weight's name
on disk; the filling is part of them, and `cut` takes it off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from bridge.errors import UsageError
from bridge.lora.spec import Target
from bridge.mapping.table import Entry, HfTensor, Table
from bridge.mapping.transforms import Block

Part = Literal["A", "B"]
PARTS: tuple[Part, Part] = ("A", "B")


# Where adapters come from: (target, "A" or "B") -> A [(E,) r, in] or B [(E,) out, r], without filling.
Values = Callable[[Target, Part], Tensor]


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
        return not super().covers(key)


def adapter_table(table: Table, targets: Sequence[Target]) -> AdapterTable:
    """The table of adapters for `targets`. Raises UsageError for a target that is no matrix of the model."""
    held: dict[str, dict[int, Target]] = {}
    for target in targets:
        entry, source = table.by_hf_name.get(target.name, (None, 0))
        if entry is None or len(entry.shape) not in (2, 3) or not entry.row.trainable:
            raise UsageError(f"{target.name}: no weight of this model that can have an adapter")
        if target.kind == "embedding":
            raise UsageError(f"{target.name}: adapters of embeddings are not built")
        held.setdefault(entry.key, {})[source] = target
    adapted = {key: Adapted(entry, held[key]) for key, entry in table.entries.items() if key in held}
    entries = {entry.key: entry for each in adapted.values() for entry in _entries(each)}
    return AdapterTable(table.geometry, entries, {}, {}, adapted)


def part_name(name: str, part: Part) -> str:
    """The name of one factor of the adapter of the HF tensor `name`, in an adapter table."""
    return f"{name}.lora_{part}"


def cut(tensor: Tensor, target: Target, part: Part) -> Tensor:
    """A tensor of the table without its filling: A [(E,) r, in] or B [(E,) out, r] of the target's own rank."""
    return tensor.narrow(-2 if part == "A" else -1, 0, target.rank)


def _entries(adapted: Adapted) -> Iterator[Entry]:
    weight, rank = adapted.weight, adapted.rank
    *experts, rows, columns = weight.shape
    order = adapted.order
    shard = weight.row.shard
    key = weight.key.removesuffix(".weight")
    names = [adapted.targets[source].name for source in order]

    if adapted.experts:
        blocks = weight.blocks
        shapes = {"A": (*experts, rank, columns), "B": (*experts, rows, rank)}
        shards = {"A": (shard[0], None, shard[2]), "B": (shard[0], shard[1], None)}
        for part in PARTS:
            sources = tuple(HfTensor(part_name(name, part), shapes[part]) for name in names)
            yield replace(
                weight,
                key=f"{key}.lora_{part}",
                shape=shapes[part],
                sources=sources,
                blocks=blocks,
                row=replace(weight.row, shard=shards[part]),
            )
        return
    yield replace(
        weight,
        key=f"{key}.lora_A",
        shape=(len(order) * rank, columns),
        sources=tuple(HfTensor(part_name(name, "A"), (rank, columns)) for name in names),
        blocks=tuple(Block(number * rank, number, 0, rank) for number in range(len(order))),
        row=replace(weight.row, shard=(None, shard[1])),
    )
    yield replace(
        weight,
        key=f"{key}.lora_B",
        shape=(rows, rank),
        sources=tuple(
            HfTensor(part_name(name, "B"), (weight.sources[source].shape[0], rank))
            for name, source in zip(names, order, strict=True)
        ),
        blocks=tuple(
            replace(block, source=order.index(block.source)) for block in weight.blocks if block.source in order
        ),
        row=replace(weight.row, shard=(shard[0], None)),
    )
