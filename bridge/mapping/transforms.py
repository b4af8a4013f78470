"""How the rows of Hugging Face tensors lie in one Megatron tensor.

Every transform of the tables is a rearrangement of blocks of rows (axis 0): linear, exact and invertible. A transform
is therefore a function from shapes to a list of `RowBlock`s, and the same blocks drive whole tensors, streamed chunks,
shards of a live model, gradients, and (read backwards) the export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bridge.errors import MappingError
from bridge.geometry import LayerGeometry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowBlock:
    """Rows [row, row + num_rows) of the Megatron tensor are rows from `source_row` of HF tensor number `source`."""

    row: int
    source: int
    source_row: int
    num_rows: int


RowLayout = tuple[Shape, tuple[RowBlock, ...]]
Transform = Callable[[Sequence[Shape], LayerGeometry | None], RowLayout]


def copy(shapes: Sequence[Shape], layer: LayerGeometry | None) -> RowLayout:
    """One HF tensor, unchanged."""
    (shape,) = shapes
    return shape, (RowBlock(0, 0, 0, num_rows(shape)),)


def stack(shapes: Sequence[Shape], layer: LayerGeometry | None) -> RowLayout:
    """HF tensors one below the other: [gate; up]."""
    blocks, row = [], 0
    for source, shape in enumerate(shapes):
        blocks.append(RowBlock(row, source, 0, num_rows(shape)))
        row += num_rows(shape)
    return (row, *shapes[0][1:]), tuple(blocks)


def scalar(shapes: Sequence[Shape], layer: LayerGeometry | None) -> RowLayout:
    """A tensor without axes on disk, of one row in Megatron, so that it is read and sharded like any other."""
    return (1,), (RowBlock(0, 0, 0, 1),)


def interleave_groups(shapes: Sequence[Shape], layer: LayerGeometry | None) -> RowLayout:
    """The query heads, key head and value head of each query group together: [q ... q k v] x groups.

    Takes (q, k, v), or (q, k) where values come from the key projection.
    """
    if layer is None:
        raise MappingError("interleave_groups is a transform of decoder layers")
    groups = layer.num_query_groups
    blocks, row = [], 0
    for group in range(groups):
        for source, shape in enumerate(shapes):
            rows = num_rows(shape) // groups
            blocks.append(RowBlock(row, source, group * rows, rows))
            row += rows
    return (row, *shapes[0][1:]), tuple(blocks)


def num_rows(shape: Shape) -> int:
    """Rows of a tensor along axis 0; a 0-d tensor is one row."""
    return shape[0] if shape else 1
