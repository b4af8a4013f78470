"""Writing a Megatron-Core distributed checkpoint (`torch_dist`) by rows, without torch and without building the model.

The place of every item is planned before the first byte: tensors are cut into chunks of whole rows, chunks into files.
So rows may come in any order and from any thread, and a file that an interrupted run completed can be kept.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError
from bridge.hf.tensors import (
    RowChunk,
    TensorSpec,
    Unit,
    as_bytes,
    check_rows,
    fsync_folder,
    pread_bytes,
    pread_into,
    printable,
    row_bytes,
    split_rows,
)
from bridge.hf.writer import UnitFiles, write_text
from bridge.torch_dist.format import DTYPES, item_sizes, object_item, tensor_item
from bridge.torch_dist.pickles import Call, DictItems, Global, Instance, dumps

CHUNK_BYTES = 8 << 20
FILE_BYTES = 512 << 20
METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
# Megatron-Core 0.19 keeps everything that is not a sharded tensor in this one object.
COMMON_KEY = "common_state/shard_0_1"

_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE = Global("torch", "Size")
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class _Item:
    """A planned item: a chunk and its place."""

    chunk: RowChunk
    file: str
    offset: int
    length: int


class DistWriter(UnitFiles):
    """Writes a `torch_dist` folder that Megatron-Core's own loader reads at any parallel layout. Thread-safe.

    `write_rows` takes rows that are one planned chunk or several whole ones (`chunks` says where they are cut);
    `finish` writes the common state and the metadata, without which the folder is not a checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Sequence[TensorSpec],
        chunk_bytes: int = CHUNK_BYTES,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        super().__init__(folder, tensors)
        self._items: dict[tuple[str, int], _Item] = {}
        self._by_file: dict[str, list[_Item]] = {}
        self._plan(tensors, chunk_bytes, file_bytes)

    def _plan(self, tensors: Sequence[TensorSpec], chunk_bytes: int, file_bytes: int) -> None:
        file, filled = "", file_bytes
        for spec in tensors:
            if spec.dtype not in DTYPES:
                raise CheckpointError(
                    f"{printable(self.folder)}: tensor {printable(spec.name)} has the dtype {spec.dtype}"
                )
            for chunk in split_rows(spec, chunk_bytes):
                length = sum(item_sizes(spec.dtype, self._chunk_shape(spec, chunk)))
                if filled + length > file_bytes:
                    file, filled = f"__0_{len(self._by_file)}.distcp", 0
                    self._by_file[file] = []
                item = _Item(chunk, file, filled, length)
                self._items[spec.name, chunk.start] = item
                self._by_file[file].append(item)
                filled += length
                self._sizes[file] = filled

    @staticmethod
    def _chunk_shape(spec: TensorSpec, chunk: RowChunk) -> tuple[int, ...]:
        return (chunk.stop - chunk.start, *spec.shape[1:]) if spec.shape else ()

    def units(self, chunk_bytes: int) -> tuple[Unit, ...]:
        """The files and their chunks. The chunks are the writer's own, whatever `chunk_bytes` asks for."""
        del chunk_bytes
        return tuple(
            Unit(file, self._sizes[file], tuple(item.chunk for item in items)) for file, items in self._by_file.items()
        )

    def chunks(self, name: str) -> list[RowChunk]:
        """How one tensor is cut, in order."""
        return sorted((item.chunk for (key, _), item in self._items.items() if key == name), key=lambda c: c.start)

    def write_rows(self, name: str, start: int, array: Any, crc: int | None = None) -> None:
        """Write whole chunks from row `start` on; `array` is contiguous, of any dtype, with exactly their bytes.

        `crc` is the CRC32 of the bytes where the caller has it already (and `array` is one chunk). Raises
        CheckpointError: rows that are not whole chunks, a disk that is full.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{printable(self.folder)}: no tensor {printable(name)} was planned")
        view, size = as_bytes(array), row_bytes(spec)
        while True:
            item = self._items.get((name, start))
            if item is None or len(view) < item.chunk.nbytes:
                raise CheckpointError(
                    f"{printable(self.folder)}: rows from {start} of {printable(name)} are not whole chunks"
                )
            chunk = item.chunk
            check_rows(name, spec, chunk.start, chunk.stop, chunk.nbytes)
            payload, view = view[: chunk.nbytes], view[chunk.nbytes :]
            head, tail = tensor_item(
                spec.dtype, self._chunk_shape(spec, chunk), zlib.crc32(payload) if crc is None or view else crc
            )
            self._pwrite(item.file, [head, payload, tail], item.offset)
            self._ledger.add(name, chunk.start, chunk.stop)
            start, crc = chunk.stop, None
            if not view or not size:
                return

    def _holds(self, fd: int, unit: Unit, crcs: Sequence[int], scratch: memoryview) -> bool:
        path = self.folder / unit.file
        for item, crc in zip(self._by_file[unit.file], crcs, strict=True):
            spec, view = self.specs[item.chunk.name], scratch[: item.chunk.nbytes]
            head, tail = tensor_item(spec.dtype, self._chunk_shape(spec, item.chunk), crc)
            pread_into(fd, view, item.offset + len(head), path)
            behind = item.offset + len(head) + len(view)
            if (
                zlib.crc32(view) != crc
                or pread_bytes(fd, len(head), item.offset, path) != head
                or pread_bytes(fd, len(tail), behind, path) != tail
            ):
                return False
        return True

    def finish(
        self, common_state: Mapping[str, Any] | None = None, content_metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Check that every byte was written once, then write common state, `.metadata` and `metadata.json`.

        `common_state` (plain values only) is what Megatron's `load` returns beside the tensors; `content_metadata`,
        recorded in it, is what the sharded state dict was asked for with, by default per-layer keys. The two metadata
        files come last: without them the folder is no checkpoint. Raises CheckpointError.
        """
        self._ledger.check()
        self._finish_files()
        common = dict(common_state or {})
        common["content_metadata"] = dict(content_metadata or {"non_homogeneous_layers": True})
        _check_plain(common, "the common state")
        data, common_file = object_item([common]), f"__0_{len(self._by_file)}.distcp"
        write_text(self.folder / common_file, data)
        write_text(self.folder / METADATA_FILE, dumps(self._metadata(common_file, len(data))))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_text(self.folder / CONFIG_FILE, json.dumps(config))
        fsync_folder(self.folder)

    def _metadata(self, common_file: str, common_bytes: int) -> Instance:
        """torch.distributed.checkpoint's Metadata, as torch itself would pickle it."""
        tensors: list[tuple[Any, Any]] = []
        storage: list[tuple[Any, Any]] = []
        by_name: dict[str, list[_Item]] = {name: [] for name in self.specs}
        for item in self._items.values():
            by_name[item.chunk.name].append(item)
        for name, items in by_name.items():
            spec = self.specs[name]
            chunks: list[Instance] = []
            for item in items:
                offsets = (item.chunk.start, *(0,) * (len(spec.shape) - 1)) if spec.shape else ()
                chunks.append(
                    _new(
                        "ChunkStorageMetadata", offsets=_size(offsets), sizes=_size(self._chunk_shape(spec, item.chunk))
                    )
                )
                index = _new("MetadataIndex", fqn=name, index=None, offset=_size(offsets))
                storage.append((index, _storage_info(item.file, item.offset, item.length)))
            properties = Instance(Global(_METADATA, "TensorProperties"), (), _properties(spec.dtype))
            tensors.append(
                (name, _new("TensorStorageMetadata", properties=properties, size=_size(spec.shape), chunks=chunks))
            )
        tensors.append((COMMON_KEY, Instance(Global(_METADATA, "BytesStorageMetadata"))))
        storage.append((_new("MetadataIndex", fqn=COMMON_KEY, index=None), _storage_info(common_file, 0, common_bytes)))
        meta = _new("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
        return _new(
            "Metadata",
            state_dict_metadata=DictItems(tensors),
            planner_data=None,
            storage_data=DictItems(storage),
            storage_meta=meta,
            version="1.0.0",
        )


def _new(name: str, **state: Any) -> Instance:
    return Instance(Global(_METADATA, name), (), state)


def _size(shape: tuple[int, ...]) -> Call:
    return Call(_SIZE, (shape,))


def _storage_info(file: str, offset: int, length: int) -> Instance:
    cls = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    return Instance(cls, (), {"relative_path": file, "offset": offset, "length": length})


def _properties(dtype: str) -> tuple[Any, ...]:
    """The state of TensorProperties: dtype, layout, requires_grad, memory format, pinned."""
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    return (Global("torch", DTYPES[dtype][0]), layout, False, memory_format, False)


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Only plain values are stored: what reads them back without trusting the file is then certain."""
    if depth > 32:
        raise CheckpointError(f"{where} is nested too deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, which is not a string")
            _check_plain(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif not isinstance(value, _PLAIN):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, only plain values can be stored")
