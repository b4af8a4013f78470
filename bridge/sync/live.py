"""The weights of a live, sharded model for an inference engine: all once, then what training changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from itertools import groupby
from typing import Literal, get_args

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge.convert.live import CHUNK_BYTES, Ranks, boxes, gather_into
from bridge.errors import UsageError
from bridge.lora.formats import StoredTensor, stored_tensors
from bridge.lora.live import AdapterGatherer, open_gatherer
from bridge.lora.spec import Factor, Target
from bridge.mapping import Table
from bridge.sync.buckets import BUCKET_BYTES, Bucket, Group, SyncTensor, plan_buckets, with_siblings
from bridge.sync.send import Sent, WeightSink, send
from bridge.together import together

# "merge": weights with adapters in them; "leave": the base's; "only": the adapters.
What = Literal["merge", "leave", "only"]


class WeightSync:
    """A live model's weights, sent again and again. Every rank makes one and calls `send`; `ranks` have a sink.

    `model`: this rank's chunks, in DDP or without. `ranks`: who receives whole tensors; None: all. `bucket_bytes`: the
    bound of a bucket; a Megatron tensor that is larger is a bucket by itself. `adapters` of a model that has some:
    "merge" adds them to the weights as `iter_hf_weights` does, "leave" gives the base, "only" gives the adapters
    alone, in `adapter_format` (peft, vllm or sglang).

    The first `send` is of everything. Later ones leave out what is frozen: parameters that take no gradient, where
    nothing that an engine loads with them does (see `with_siblings`).
    """

    def __init__(
        self,
        table: Table,
        model: Sequence[torch.nn.Module],
        *,
        ranks: Ranks = (0,),
        bucket_bytes: int = BUCKET_BYTES,
        adapters: What = "merge",
        adapter_format: str = "peft",
    ) -> None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if bucket_bytes < 1:
            raise UsageError(f"bucket_bytes={bucket_bytes}: a bucket holds a byte at least")
        if ranks is not None and (not ranks or not set(ranks) <= set(range(world)) or len(set(ranks)) < len(ranks)):
            raise UsageError(f"ranks={list(ranks)}: expected some of 0 to {world - 1}, each once")
        if adapters not in get_args(What):
            raise UsageError(f"adapters={adapters!r}: known are {', '.join(get_args(What))}")
        self._table, self._model, self._ranks, self._bucket_bytes = table, model, ranks, bucket_bytes
        self._adapters, self._format = adapters, adapter_format
        self._sent = False

    @property
    def receives(self) -> bool:
        """Whether this rank is one of those that receive."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return self._ranks is None or rank in self._ranks

    def plan(self, *, everything: bool | None = None) -> tuple[Bucket, ...]:
        """What the next `send` sends, the same on every rank. Collective."""
        return self._plan(self._open(), everything)

    def send(self, sink: WeightSink | None, *, everything: bool | None = None) -> Sent:
        """Send the weights of the last update to `sink`, which ranks that receive nothing need not have. Collective.

        `everything`: frozen ones as well; None: as this is the first time or not. Raises UsageError where a rank that
        receives has no sink, and what any rank raises, on all of them.
        """
        with together():
            if self.receives and sink is None:
                raise UsageError("a rank that receives weights needs a sink for them")
        source = self._open()
        sent = send(source, self._plan(source, everything), sink if self.receives else None)
        self._sent = True
        return sent

    def _plan(self, source: LiveWeights | LiveAdapters, everything: bool | None) -> tuple[Bucket, ...]:
        groups = source.groups
        if not (everything if everything is not None else not self._sent):
            groups = with_siblings(groups, source.trained)
        return plan_buckets(groups, self._bucket_bytes)

    def _open(self) -> LiveWeights | LiveAdapters:
        # What is gathered is a part of what is bounded: several chunks, of merged weights in float32.
        chunk_bytes = min(CHUNK_BYTES, max(1, self._bucket_bytes // 16))
        if self._adapters == "only":
            return LiveAdapters(self._model, self._table, self._format, self._ranks, chunk_bytes)
        return LiveWeights(self._model, self._table, self._adapters, self._ranks, chunk_bytes)


class LiveWeights:
    """The weights of a live model as a `WeightSource`; `trained`: keys of Megatron tensors that training changes."""

    def __init__(
        self, model: Sequence[torch.nn.Module], table: Table, adapters: str, ranks: Ranks, chunk_bytes: int
    ) -> None:
        self._gatherer, self._ranks = open_gatherer(model, table, adapters, chunk_bytes), ranks
        self.groups = [
            tuple(
                SyncTensor(source.name, key, self._gatherer.dtype(key), tuple(source.shape)) for source in entry.sources
            )
            for key, entry in table.entries.items()
            if key in self._gatherer.owners
        ]
        self.trained = _trained(model)
        held = unwrap_model(model[0]).adapter_table
        if held is not None and adapters == "merge":
            self.trained |= set(held.adapted)

    def fill(self, bucket: Bucket, views: Mapping[str, Tensor] | None) -> None:
        """See `WeightSource.fill`."""
        for key in dict.fromkeys(tensor.megatron for tensor in bucket.tensors):
            sources = enumerate(self._gatherer.table.entries[key].sources)
            out = None if views is None else {number: views[source.name] for number, source in sources}
            gather_into(self._gatherer, key, out, self._ranks)


class LiveAdapters:
    """The adapters of a live model as a `WeightSource`, in one of the formats of `lora.formats`.

    Raises UsageError: a model without adapters; one that the format cannot hold.
    """

    def __init__(
        self, model: Sequence[torch.nn.Module], table: Table, adapter_format: str, ranks: Ranks, chunk_bytes: int
    ) -> None:
        self._gatherer, self._ranks = AdapterGatherer(model, adapter_format, chunk_bytes), ranks
        self._stored: dict[str, StoredTensor] = {}
        self.groups: list[Group] = []
        stored = stored_tensors(adapter_format, list(self._gatherer.table.targets), table)
        for _, pieces in groupby(stored, _factor):
            self.groups.append(tuple(map(self._described, pieces)))
        self.trained = _trained(model)

    def _described(self, piece: StoredTensor) -> SyncTensor:
        self._stored[piece.key] = piece
        key = self._gatherer.key(piece.target, piece.part)
        return SyncTensor(piece.key, key, self._gatherer.dtype(piece.target, piece.part), tuple(piece.shape))

    def fill(self, bucket: Bucket, views: Mapping[str, Tensor] | None) -> None:
        """See `WeightSource.fill`. Factors are small: a Megatron tensor of them is in memory at a time."""
        device = "cpu" if not views else next(iter(views.values())).device
        pieces = (self._stored[tensor.name] for tensor in bucket.tensors)
        for (target, part), of_factor in groupby(pieces, _factor):
            factor = self._gatherer.factor(target, part, self._ranks, device)
            if views is None or factor is None:
                continue
            for piece in of_factor:
                views[piece.key].copy_(piece.view(factor).reshape(piece.shape))


def _factor(piece: StoredTensor) -> tuple[Target, Factor]:
    return piece.target, piece.part


def _trained(model: Sequence[torch.nn.Module]) -> Set[str]:
    """Keys of the Megatron tensors of which some rank holds a part that takes a gradient. Collective."""
    wanted: Callable[[Tensor], Tensor | None] = lambda p: p.data if p.requires_grad else None  # noqa: E731
    with together():
        mine = {box.key for box in boxes(model, wanted)}
    if not torch.distributed.is_initialized():
        return mine
    everyone: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return set().union(*everyone)
