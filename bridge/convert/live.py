"""Weights of a live, sharded Megatron model: filled from, and turned back into, Hugging Face tensors.

How a model is sharded is Megatron's knowledge: its sharded state dict says which box of which global tensor a
parameter is. The tables say where the rows of that tensor come from. Nothing else is needed, for any parallel layout,
and the same walk serves gradients, which map like their weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import MappingError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import RowReader, TensorLike, num_rows
from bridge.mapping.table import Entry, Table
from bridge.mapping.transforms import RowBlock
from bridge.together import together

# How much is read, sent or written at once.
CHUNK_BYTES = 64 << 20

# Ranks that receive; None: all.
Ranks = tuple[int, ...] | None

# What Megatron is asked for: one checkpoint key per layer, because layers differ in shape.
METADATA = {"non_homogeneous_layers": True}


@runtime_checkable
class TensorSource(Protocol):
    """What has its rows as tensors, on whatever device: they go to the model without a copy in the host's memory."""

    @property
    def tensors(self) -> Mapping[str, TensorLike]: ...

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in its dtype; of a 0-d tensor row 0."""
        ...


@dataclass(frozen=True)
class Box:
    """A parameter of this rank, or a part of one: where it lies in a global Megatron tensor, and its values.

    `main` is True on exactly one of the ranks that hold the box.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    main: bool

    @property
    def rows(self) -> range:
        """Rows of the global tensor that the box covers."""
        return range(self.offset[0], self.offset[0] + self.tensor.shape[0])


def boxes(model: Sequence[torch.nn.Module], value: Callable[[Tensor], Tensor | None] = lambda p: p.data) -> list[Box]:
    """Every box of a model on this rank; `value` picks what of a parameter is meant: its data, its gradient."""
    found: list[Box] = []
    for chunk in model:
        for item in unwrap_model(chunk).sharded_state_dict(metadata=dict(METADATA)).values():
            if not isinstance(item, ShardedTensor | ShardedTensorFactory):
                continue  # _extra_state of layers that have any: no weights
            tensor = value(item.data)
            if tensor is None:
                continue
            if isinstance(item, ShardedTensorFactory):
                parts = item.build_fn(item.key, tensor, item.replica_id, None)
            else:
                item.data = tensor
                parts = [item]
            found += [
                Box(p.key, tuple(p.global_shape), tuple(p.global_offset), p.data, is_main_replica(p.replica_id))
                for p in parts
            ]
    return found


def load_from_hf(model: Sequence[torch.nn.Module], table: Table, reader: RowReader | TensorSource) -> None:
    """Fill a live model from an HF folder; each rank reads the rows of its own boxes, in bounded chunks."""
    _load(model, table, reader, megatron=False)


def load_from_megatron(model: Sequence[torch.nn.Module], table: Table, reader: RowReader) -> None:
    """Fill a live model from a Megatron distributed checkpoint, written at whatever layout."""
    _load(model, table, reader, megatron=True)


def _load(model: Sequence[torch.nn.Module], table: Table, reader: RowReader | TensorSource, *, megatron: bool) -> None:
    fill_boxes([box for box in boxes(model) if table.covers(box.key)], table, reader, megatron)
    for chunk in model:
        unwrap_model(chunk).clear_padding()


def fill_boxes(held: Iterable[Box], table: Table, reader: RowReader | TensorSource, megatron: bool) -> None:
    """Fill boxes from a Megatron checkpoint (`megatron`) or a Hugging Face folder, in bounded chunks."""
    by_key: dict[str, list[Box]] = defaultdict(list)
    for box in held:
        by_key[box.key].append(box)
    for key, of_key in by_key.items():
        entry = _entry(table, key, of_key[0].global_shape)
        whole = RowBlock(0, 0, 0, max(1, entry.shape[0]))
        pieces = [(whole, key)] if megatron else [(block, entry.sources[block.source].name) for block in entry.blocks]
        for block, name in pieces:
            wanted = [box for box in of_key if _overlap(box.rows, block)]
            if not wanted:
                continue
            # Boxes of one key (the layers of a per-layer table, say) share rows: read each row once for all of them.
            low = max(block.row, min(box.rows.start for box in wanted))
            high = min(block.row + block.num_rows, max(box.rows.stop for box in wanted))
            first = block.source_row + low - block.row
            columns = _columns(reader, entry.shape, wanted)
            for start, tensor in read_chunks(reader, name, first, high - low, entry.shape[1:], columns):
                _scatter(tensor, low + start, columns.start, wanted)


def _columns(reader: RowReader | TensorSource, shape: tuple[int, ...], wanted: Sequence[Box]) -> range:
    """The part of axis 1 that the boxes span, where it can be read alone; else all of it."""
    if len(shape) < 2:
        return range(1)
    if not isinstance(reader, HfFolder):
        return range(shape[1])
    low = min(box.offset[1] for box in wanted)
    return range(low, max(box.offset[1] + box.tensor.shape[1] for box in wanted))


def read_chunks(
    reader: RowReader | TensorSource,
    name: str,
    first: int,
    count: int,
    row_shape: tuple[int, ...],
    columns: range | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Rows [first, first + count) of a stored tensor, `columns` of axis 1 (None: all), in chunks.

    Yields (offset from `first`, rows), the rows in the dtype that is stored.
    """
    if columns is None:
        columns = range(row_shape[0] if row_shape else 1)
    dtype = TORCH_DTYPES[reader.tensors[name].dtype]
    inner = math.prod(row_shape[1:])
    shape = (len(columns), *row_shape[1:]) if row_shape else ()
    row_bytes = math.prod(shape) * dtype.itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, count, step):
        rows = min(step, count - start)
        if isinstance(reader, TensorSource):
            yield start, reader.tensor_rows(name, first + start, first + start + rows).view(rows, *shape)
            continue
        buffer = np.empty(rows * row_bytes, dtype=np.uint8)
        if not row_shape or len(columns) == row_shape[0]:
            reader.read_rows(name, first + start, first + start + rows, buffer)
        else:
            assert isinstance(reader, HfFolder)
            span = columns.start * inner, columns.stop * inner
            reader.read_columns(name, first + start, first + start + rows, *span, buffer)
        yield start, torch.from_numpy(buffer).view(dtype).view(rows, *shape)


@torch.no_grad()
def _scatter(rows: Tensor, first_row: int, first_column: int, wanted: Sequence[Box]) -> None:
    """Copy rows of a global tensor, from `first_column` of axis 1 on, into the boxes that hold a part of them."""
    for box in wanted:
        low = max(first_row, box.rows.start)
        high = min(first_row + rows.shape[0], box.rows.stop)
        if low < high:
            offsets = [o - first_column if axis == 0 else o for axis, o in enumerate(box.offset[1:])]
            columns = tuple(slice(o, o + n) for o, n in zip(offsets, box.tensor.shape[1:], strict=True))
            source = rows[(slice(low - first_row, high - first_row), *columns)]
            box.tensor[low - box.rows.start : high - box.rows.start].copy_(source)


def _overlap(rows: range, block: RowBlock) -> bool:
    return rows.start < block.row + block.num_rows and block.row < rows.stop


def _entry(table: Table, key: str, shape: tuple[int, ...]) -> Entry:
    entry = table.entries.get(key)
    if entry is None:
        raise MappingError(f"the model has {key}, which is in no mapping table")
    if entry.shape != shape:
        raise MappingError(f"the model's {key} has shape {list(shape)}, the table's {list(entry.shape)}")
    return entry


@dataclass(frozen=True)
class _Owner:
    """Where one main box of a key is."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Gatherer:
    """Rows of whole Megatron tensors out of a live sharded model. Every rank of the world takes part in every call.

    What fails on one rank before anything is sent is raised on all of them.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        table: Table,
        value: Callable[[Tensor], Tensor | None] = lambda p: p.data,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.table, self.chunk_bytes = table, chunk_bytes
        self._mine: dict[str, list[Box]] = defaultdict(list)
        with together():
            for box in boxes(model, value):
                if box.main and table.covers(box.key):
                    self._mine[box.key].append(box)
        self._rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.owners = self._gather_owners()
        for key, owners in self.owners.items():
            entry = _entry(table, key, self._global_shape(key, owners))
            held = sum(math.prod(owner.shape) for owner in owners)
            if held != math.prod(entry.shape):
                raise MappingError(f"{key}: the ranks hold {held} of {math.prod(entry.shape)} values")

    def _gather_owners(self) -> dict[str, list[_Owner]]:
        mine = {
            key: [_Owner(self._rank, box.offset, tuple(box.tensor.shape), box.tensor.dtype) for box in held]
            for key, held in self._mine.items()
        }
        everyone = [mine]
        if torch.distributed.is_initialized():
            everyone = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(everyone, mine)
        owners: dict[str, list[_Owner]] = defaultdict(list)
        for held_by_rank in everyone:
            for key, found in held_by_rank.items():
                owners[key] += found
        return owners

    def _global_shape(self, key: str, owners: Sequence[_Owner]) -> tuple[int, ...]:
        return tuple(
            max(owner.offset[axis] + owner.shape[axis] for owner in owners) for axis in range(len(owners[0].shape))
        )

    def rows(
        self, key: str, start: int, stop: int, ranks: Ranks = None, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """Rows [start, stop) of tensor `key` on `device`, on every rank, or on `ranks` only (None elsewhere)."""
        receives = ranks is None or self._rank in ranks
        shape = self.table.entries[key].shape[1:]
        with together():
            dtype = self.dtype(key)
            whole = torch.empty(stop - start, *shape, dtype=dtype, device=device) if receives else None
        # A device that trains has no room for all of it at once.
        step = self.chunk_rows(key)
        for low in range(start, stop, step):
            self._fill(whole, key, start, range(low, min(low + step, stop)), ranks)
        return whole

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.owners[key][0].dtype

    def chunk_rows(self, key: str) -> int:
        """How many rows of a tensor are sent at once, one at least."""
        size = math.prod(self.table.entries[key].shape[1:]) * self.dtype(key).itemsize
        return max(1, self.chunk_bytes // max(1, size))

    def _fill(self, whole: Tensor | None, key: str, start: int, rows: range, ranks: Ranks) -> None:
        """`rows` of a tensor into `whole`, which begins at row `start`, where this rank receives them."""
        with together():
            # All memory that this takes: from there on nothing is left that one rank alone might fail at.
            pieces = list(self._pieces(key, rows.start, rows.stop, whole is not None))
        for owner, low, piece in pieces:
            self._move(piece, owner.rank, ranks)
            if whole is not None:
                columns = tuple(slice(o, o + n) for o, n in zip(owner.offset[1:], owner.shape[1:], strict=True))
                whole[(slice(low - start, low - start + len(piece)), *columns)].copy_(piece)

    def _pieces(self, key: str, start: int, stop: int, receives: bool) -> Iterator[tuple[_Owner, int, Tensor]]:
        """(owner, first row, values or room for them) of what this rank sends or receives of rows [start, stop)."""
        position: dict[int, int] = defaultdict(int)
        for owner in self.owners[key]:
            box_number = position[owner.rank]
            position[owner.rank] += 1
            low, high = max(start, owner.offset[0]), min(stop, owner.offset[0] + owner.shape[0])
            if low >= high:
                continue
            if owner.rank == self._rank:
                box = self._mine[key][box_number]
                yield owner, low, box.tensor[low - box.rows.start : high - box.rows.start].detach().contiguous()
            elif receives:
                device = torch.cuda.current_device()
                yield owner, low, torch.empty((high - low, *owner.shape[1:]), dtype=owner.dtype, device=device)

    def _move(self, piece: Tensor, owner: int, ranks: Ranks) -> None:
        """From the rank `owner` to `ranks`, or to all."""
        if not torch.distributed.is_initialized():
            return
        if ranks is None:
            torch.distributed.broadcast(piece, src=owner)
            return
        for rank in ranks:
            if rank == self._rank != owner:
                torch.distributed.recv(piece, src=owner)
            elif owner == self._rank != rank:
                torch.distributed.send(piece, dst=rank)


def by_source(entry: Entry, first: int, rows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows of a Megatron tensor, from `first` on, as (number of the HF tensor, its first row, rows): views."""
    for block in entry.blocks:
        low, high = max(first, block.row), min(first + len(rows), block.row + block.num_rows)
        if low < high:
            yield block.source, block.source_row + low - block.row, rows[low - first : high - first]


def gather_into(gatherer: Gatherer, key: str, out: Mapping[int, Tensor] | None, ranks: Ranks = None) -> None:
    """The HF tensors of a Megatron tensor, whole, into `out` (by their number) on the ranks that receive. Collective.

    Those that are not in `out` are left. Beside `out` there is one chunk in memory, on its device.
    """
    entry = gatherer.table.entries[key]
    device = torch.device("cpu") if not out else next(iter(out.values())).device
    rooms = {n: tensor.view(num_rows(tensor.shape), *entry.shape[1:]) for n, tensor in (out or {}).items()}
    rows, step = num_rows(entry.shape), gatherer.chunk_rows(key)
    for start in range(0, rows, step):
        # Nothing here holds on to a chunk while the next one comes.
        _into(rooms, entry, start, gatherer.rows(key, start, min(start + step, rows), ranks, device))


def _into(rooms: Mapping[int, Tensor], entry: Entry, start: int, chunk: Tensor | None) -> None:
    """Rows of a Megatron tensor, from `start` on, to where they belong in the HF tensors that have room."""
    for source, row, part in by_source(entry, start, chunk) if chunk is not None else ():
        if source in rooms:
            rooms[source][row : row + len(part)].copy_(part)


def iter_hf(gatherer: Gatherer, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor) out of a live model, on every rank, one Megatron tensor in memory at a time.

    Order and names are those of the tables; what is carried beside a checkpoint is not part of a model.
    """
    for key, entry in gatherer.table.entries.items():
        if key not in gatherer.owners:
            continue
        with together():
            dtype = gatherer.dtype(key)
            sources = enumerate(entry.sources)
            whole = {n: torch.empty(source.shape, dtype=dtype, device=device) for n, source in sources}
        gather_into(gatherer, key, whole)
        for number, source in enumerate(entry.sources):
            yield source.name, whole[number]
