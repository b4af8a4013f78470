"""Models of which one layer at a time is in memory: weights come when a layer begins to run, and go when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridge.convert.live import CHUNK_BYTES, Box, boxes, fill_boxes, read_chunks
from bridge.errors import VerificationError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import RowReader, num_rows
from bridge.mapping.table import Table
from bridge.megatron.towers.linear import Layers

# Of a tensor's first byte: what torch's own allocator gives.
_ALIGNMENT = 64


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of decoder and towers, of either side: what lists of modules hold, outermost lists alone."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child.children() if isinstance(child, nn.ModuleList | Layers) else layers_of(child)
    return found


def come_and_go(layers: Sequence[nn.Module], load: Callable[[nn.Module], None]) -> None:
    """From now on the weights of each of `layers` are there while it runs: `load` fills them just before.

    They lie in the same memory, one layer's after the other's, which is given back when all have run.
    """
    memory = _LayerMemory(max(map(_layer_bytes, layers), default=0))
    waiting = set(map(id, layers))

    def enter(layer: nn.Module, args: Any) -> None:
        for tensor, data in zip(tensors_of(layer).values(), memory.like(tensors_of(layer).values()), strict=True):
            tensor.data = data
        load(layer)

    def leave(layer: nn.Module, args: Any = None, output: Any = None) -> None:
        for tensor in tensors_of(layer).values():
            # It keeps its shape, by which it is found among the keys of a checkpoint.
            tensor.data = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

    def left(layer: nn.Module, args: Any, output: Any) -> None:
        leave(layer)
        waiting.discard(id(layer))
        if not waiting:
            memory.give_back()

    for layer in layers:
        leave(layer)
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(left)


def _layer_bytes(layer: nn.Module) -> int:
    return sum(map(_aligned_bytes, tensors_of(layer).values()))


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


class _LayerMemory:
    """Memory of one layer, for one after the other: what is freed piece by piece the allocator keeps, in fragments."""

    def __init__(self, size: int) -> None:
        self._size, self._held = size, torch.empty(0, dtype=torch.uint8)

    def like(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Room for each of `tensors`, in its shape and dtype, with any values."""
        if not len(self._held):
            self._held = torch.empty(self._size, dtype=torch.uint8)
        start = 0
        for tensor in tensors:
            room = self._held[start : start + tensor.numel() * tensor.element_size()]
            yield room.view(tensor.dtype).view(tensor.shape)
            start += _aligned_bytes(tensor)

    def give_back(self) -> None:
        """Until it is asked for again."""
        self._held = torch.empty(0, dtype=torch.uint8)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a checkpoint has, by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: named[name] for name in module.state_dict(keep_vars=True) if name in named}


class OurWeights:
    """Loads parts of a whole Megatron model on one rank, from a Hugging Face folder or a Megatron checkpoint."""

    def __init__(self, model: nn.Module, table: Table, reader: RowReader, megatron: bool) -> None:
        self.model, self.table, self.reader, self.megatron = model, table, reader, megatron

    def load(self, tensors: Sequence[Tensor]) -> None:
        """All values of parameters or buffers of the model."""
        self._fill(self._boxes(tensors))

    def load_rows(self, table: Tensor, rows: Sequence[int]) -> None:
        """Some rows of an embedding."""
        for box in self._boxes([table]):
            for row in rows:
                if row in box.rows:
                    one = box.tensor[row - box.rows.start :][:1]
                    self._fill([Box(box.key, box.global_shape, (row, *box.offset[1:]), one, True)])

    def rows_of(self, key: str) -> Iterator[Tensor]:
        """Rows of a global tensor in float32, some at a time."""
        shape = self.table.entries[key].shape
        step = max(1, CHUNK_BYTES // (4 * shape[1]))
        for start in range(0, shape[0], step):
            part = torch.empty(min(step, shape[0] - start), shape[1])
            self._fill([Box(key, shape, (start, 0), part, True)])
            yield part

    def _boxes(self, tensors: Sequence[Tensor]) -> list[Box]:
        wanted = {id(tensor) for tensor in tensors}
        return [
            box
            for box in boxes([self.model], lambda p: p.data if id(p) in wanted else None)
            if self.table.covers(box.key)
        ]

    def _fill(self, held: Sequence[Box]) -> None:
        fill_boxes(held, self.table, self.reader, self.megatron)


class TheirWeights:
    """The same for a model of transformers, from the folder that it is made for."""

    def __init__(self, model: Any, folder: HfFolder) -> None:
        self.folder = folder
        self._names = {id(tensor): name for name, tensor in tensors_of(model).items()}
        self._model = model

    def load(self, tensors: Sequence[Tensor]) -> None:
        """All values. Raises VerificationError for a tensor that the folder does not have as the class wants it."""
        for name, tensor in self._on_disk({self._names[id(tensor)]: tensor for tensor in tensors}).items():
            self._known(name, tensor)
            for start, rows in self._rows(name):
                tensor.data.view(-1, *tensor.shape[1:])[start : start + len(rows)] = rows

    def load_rows(self, table: Tensor, rows: Sequence[int]) -> None:
        """Some rows of an embedding."""
        [name] = self._on_disk({self._names[id(table)]: table})
        self._known(name, table)
        for row in rows:
            for _, values in self._rows(name, row, 1):
                table.data[row] = values[0]

    def rows_of(self, name: str) -> Iterator[Tensor]:
        """Rows of a tensor of the folder in float32, some at a time."""
        for _, rows in self._rows(name):
            yield rows.float()

    def _rows(self, name: str, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        shape = self.folder.tensors[name].shape
        return read_chunks(self.folder, name, first, num_rows(shape) if count is None else count, shape[1:])

    def _on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, dict(tensors)))

    def _known(self, name: str, tensor: Tensor) -> None:
        info = self.folder.tensors.get(name)
        if info is None or info.shape != tuple(tensor.shape):
            raise VerificationError(
                f"{self.folder.path}: transformers wants {name} {list(tensor.shape)}, "
                f"the folder has {'none' if info is None else list(info.shape)}"
            )
