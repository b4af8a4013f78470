"""Plans of import and export: the tables, turned into rows to copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.convert.manifest import Manifest, ManifestTensor
from bridge.convert.pieces import CopyTensor, Piece
from bridge.errors import MappingError
from bridge.hf.tensors import RowReader, TensorLike, num_rows
from bridge.mapping import Table

# A fused tensor takes the first dtype of this list that one of its sources has: all the others widen to it exactly.
_WIDTH = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class ImportPlan:
    """What an import writes: Megatron tensors, tensors that are carried, and the manifest."""

    tensors: tuple[CopyTensor, ...]
    carried: tuple[CopyTensor, ...]
    manifest: Manifest


def plan_import(
    table: Table,
    stored: Mapping[str, TensorLike],
    prefix: str,
    dtype: str | None,
    file_metadata: Mapping[str, str],
    where: object,
) -> ImportPlan:
    """Plan the import of a folder's tensors. `dtype` (a safetensors name) converts floats, None keeps them.

    `where` is what errors call the folder.

    `prefix` is how language-model names begin in the folder, where that is not as in `table` (a text-only import of a
    multimodal folder); tensors outside of the table's names are then left behind.
    """
    narrowed = prefix != table.geometry.prefix

    def source(name: str) -> str:
        return prefix + name.removeprefix(table.geometry.prefix) if name.startswith(table.geometry.prefix) else name

    names = {source(name): name for name in [*table.by_hf_name, *table.copies, *table.carried]}
    originals = {names.get(name, name): name for name in stored if not narrowed or name in names}
    table.check_folder({name: tuple(stored[original].shape) for name, original in originals.items()}, where)

    def written(name: str) -> str:
        return _written(stored[originals[name]].dtype, dtype)

    tensors = []
    for entry in table.entries.values():
        dtypes = {s.name: written(s.name) for s in entry.sources}
        pieces = tuple(
            Piece(block.row, originals[entry.sources[block.source].name], block.source_row, block.num_rows)
            for block in entry.blocks
        )
        tensors.append(CopyTensor(entry.key, _widest(dtypes, where), entry.shape, pieces))
    carried = tuple(
        CopyTensor(name, written(name), tuple(stored[original].shape), (_whole(original, stored[original].shape),))
        for name, original in originals.items()
        if name not in table.by_hf_name and name not in table.copies
    )
    manifest = Manifest(
        table.geometry.tied,
        tuple(
            ManifestTensor(name, written(name), tuple(stored[original].shape)) for name, original in originals.items()
        ),
        file_metadata,
    )
    return ImportPlan(tuple(tensors), carried, manifest)


def plan_beside(manifest: Manifest, carried: Mapping[str, TensorLike], dtype: str | None) -> ImportPlan:
    """Plan what stands beside a trainer's weights, of the checkpoint that they began from: all but the weights.

    `carried`: its carried tensors. `dtype` as of `plan_import`.
    """
    tensors = tuple(replace(tensor, dtype=_written(tensor.dtype, dtype)) for tensor in manifest.tensors)
    copies = (CopyTensor(t.name, t.dtype, t.shape, (_whole(t.name, t.shape),)) for t in tensors if t.name in carried)
    return ImportPlan((), tuple(copies), replace(manifest, tensors=tensors))


def plan_export(table: Table, manifest: Manifest) -> tuple[CopyTensor, ...]:
    """The HF tensors of a Megatron checkpoint, out of its keys and its carried tensors. Raises MappingError."""
    tensors = []
    known = table.by_hf_name
    for tensor in manifest.tensors:
        if tensor.name in known:
            entry, index = known[tensor.name]
            pieces = tuple(Piece(b.source_row, entry.key, b.row, b.num_rows) for b in entry.blocks if b.source == index)
            if entry.sources[index].shape != tensor.shape:
                raise MappingError(
                    f"the manifest says {tensor.name} is {tensor.shape}, not {entry.sources[index].shape}"
                )
        elif tensor.name in table.copies:
            pieces = (_whole(tensor.name, tensor.shape, table.copies[tensor.name].key),)
        else:
            pieces = (_whole(tensor.name, tensor.shape),)
        tensors.append(CopyTensor(tensor.name, tensor.dtype, tensor.shape, pieces))
    written = {tensor.name for tensor in manifest.tensors}
    lost = [name for name in known if name not in written]
    if lost:
        raise MappingError(f"the manifest does not name {lost[0]}, which the model has")
    return tuple(tensors)


def narrowed(table: Table, manifest: Manifest, stored: Mapping[str, TensorLike]) -> Counter[tuple[str, str]]:
    """How many weights `plan_export` writes in a dtype that does not hold them, by (that of `stored`, that written)."""
    dtypes, found = {tensor.name: tensor.dtype for tensor in manifest.tensors}, Counter[tuple[str, str]]()
    for entry in table.entries.values():
        have = stored[entry.key].dtype
        written = _widest({source.name: dtypes[source.name] for source in entry.sources}, entry.key)
        found[have, written] += _widest({"stored": have, "written": written}, entry.key) != written
    return +found


class JoinedReader:
    """Several row readers as one; no name may occur twice."""

    def __init__(self, readers: Sequence[RowReader]) -> None:
        self._owner: dict[str, RowReader] = {}
        self.tensors: dict[str, TensorLike] = {}
        for reader in readers:
            for name, tensor in reader.tensors.items():
                if name in self._owner:
                    raise MappingError(f"tensor {name} is there twice")
                self._owner[name] = reader
                self.tensors[name] = tensor

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        self._owner[name].read_rows(name, start, stop, out)


def _written(stored: str, dtype: str | None) -> str:
    """What is stored as `stored` becomes `dtype`, if it is a float and one is asked for."""
    return dtype if dtype is not None and stored in _WIDTH else stored


def _whole(name: str, shape: Sequence[int], source: str | None = None) -> Piece:
    return Piece(0, source or name, 0, num_rows(tuple(shape)))


def _widest(dtypes: Mapping[str, str], where: object) -> str:
    """The dtype that holds the values of all `kinds` (tensor -> dtype). Raises MappingError."""
    distinct = set(dtypes.values())
    if len(distinct) == 1:
        return next(iter(distinct))
    if {"BF16", "F16"} <= distinct and not distinct & {"F32", "F64"}:
        return "F32"
    for dtype in _WIDTH:
        if dtype in distinct and distinct <= set(_WIDTH):
            return dtype
    odd = next(name for name, dtype in dtypes.items() if dtype not in _WIDTH)
    raise MappingError(
        f"{where}: {odd} is {dtypes[odd]}, which does not fuse with {', '.join(sorted(distinct - {dtypes[odd]}))}"
    )
