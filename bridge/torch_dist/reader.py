"""Reading a Megatron-Core distributed checkpoint (`torch_dist`) by rows, without torch and without trusting it.

`.metadata` is a pickle: it is read as an inert tree, so nothing in it can run. Objects (BYTES items: common state,
`_extra_state`) are skipped. Tensors may be cut into boxes along any axes, by whatever layout saved them; only the
slices that are asked for are read from inside the items.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bridge.close_on_exit import CloseOnExit
from bridge.errors import CheckpointError
from bridge.hf.descriptors import RegularFiles
from bridge.hf.tensors import (
    ITEM_SIZES,
    as_bytes,
    check_rows,
    inside,
    open_regular,
    pread_bytes,
    pread_into,
    printable,
    row_bytes,
)
from bridge.mapping.table import DRAFTER
from bridge.torch_dist import pickles
from bridge.torch_dist.format import DTYPE_OF_TORCH, TensorItem, contiguous_strides, parse_item
from bridge.torch_dist.pickles import Call, DictItems, Global, Instance
from bridge.torch_dist.writer import CONFIG_FILE, METADATA_FILE

_MAX_METADATA = 1 << 30
_MAX_CELLS = 20_000_000
# A slice that is not contiguous in its item passes through a buffer of this size.
_BOUNCE_BYTES = 8 << 20
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# Every name that a `.metadata` written by torch or Megatron-Core holds; nothing of it is imported or called.
ALLOWED_GLOBALS = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("builtins", "getattr"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_FILESYSTEM, "_StorageInfo"),
        (_FILESYSTEM, "_StoragePrefix"),
        (_PLANNER, "SavePlan"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "TensorWriteData"),
        (_PLANNER, "BytesIOWriteData"),
        (_PLANNER, "WriteItemType"),
        (_MEGATRON, "MCoreMetadata"),
        (_MEGATRON, "MCoreSavePlan"),
    }
)


@dataclass(frozen=True)
class DistChunk:
    """A box of a tensor, and the item that holds it: `offset` and `length` in bytes within `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class DistTensor:
    """A tensor of the checkpoint; its chunks, sorted by their offsets, cover it exactly once."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[DistChunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def is_weight(key: str) -> bool:
    """Whether a key is a weight of the model: not optimizer state, not the state of a quantiser, not its drafter's."""
    others = ("optimizer.", "chained_", "rng_state", "rerun_state", DRAFTER)
    return not key.startswith(others) and "_extra_state" not in key


class DistReader(CloseOnExit):
    """An open `torch_dist` folder. Thread-safe; a context manager.

    `tensors`: those keys that `select` keeps (by default the weights), each checked to be covered by its chunks; or
    those that begin with `within`, without that.
    Raises CheckpointError that names the file or key at fault.
    """

    def __init__(self, folder: str | Path, select: Callable[[str], bool] = is_weight, within: str = "") -> None:
        self.folder = Path(folder)
        self._files = RegularFiles()
        self._items: dict[tuple[Path, int], TensorItem] = {}
        self._local = threading.local()
        try:
            _check_config(self.folder)
            found = self._read_metadata(select if not within else lambda key: key.startswith(within))
            self.tensors = {key.removeprefix(within): tensor for key, tensor in found.items()}
        except BaseException:
            self.close()
            raise

    def _read_metadata(self, select: Callable[[str], bool]) -> dict[str, DistTensor]:
        path = inside(self.folder, METADATA_FILE)
        fd, size = open_regular(path)
        try:
            if size > _MAX_METADATA:
                raise CheckpointError(f"{printable(path)}: {size} bytes, which no checkpoint needs")
            data = pread_bytes(fd, size, 0, path)
        finally:
            os.close(fd)
        where = printable(path)
        root = _state(pickles.loads(data, _allowed, where), "Metadata", where)
        entries, storage = root.get("state_dict_metadata"), root.get("storage_data")
        if not isinstance(entries, DictItems) or not isinstance(storage, DictItems):
            raise CheckpointError(f"{where}: not the metadata of a distributed checkpoint")
        places = _places(storage, select, where)
        tensors: dict[str, DistTensor] = {}
        for key, entry in entries.items:
            if type(key) is not str:
                raise CheckpointError(f"{where}: a key that is not a string")
            if isinstance(entry, Instance) and entry.cls.name == "BytesStorageMetadata":
                continue
            if not select(key):
                continue
            if key in tensors:
                raise CheckpointError(f"{where}: the key {printable(key)} occurs twice")
            tensors[key] = self._tensor(key, entry, places.get(key, {}), where)
        return tensors

    def _tensor(
        self, key: str, entry: Any, places: dict[tuple[int, ...], tuple[str, int, int]], where: str
    ) -> DistTensor:
        where = f"{where}: tensor {printable(key)}"
        state = _state(entry, "TensorStorageMetadata", where)
        shape, dtype = _shape(state.get("size"), where), _dtype(state.get("properties"), where)
        listed = state.get("chunks")
        if not isinstance(listed, list):
            raise CheckpointError(f"{where}: has no list of chunks")
        chunks = []
        for item in listed:
            box = _state(item, "ChunkStorageMetadata", where)
            offsets, sizes = _shape(box.get("offsets"), where), _shape(box.get("sizes"), where)
            place = places.get(offsets)
            if place is None:
                raise CheckpointError(f"{where}: the chunk at {offsets} is in no file")
            file, offset, length = place
            path = inside(self.folder, file)
            if offset + length > self._files.size(path):
                raise CheckpointError(
                    f"{printable(path)}: shorter than the chunk at {offsets} of tensor {printable(key)}: truncated"
                )
            chunks.append(DistChunk(offsets, sizes, path, offset, length))
        _check_cover(shape, chunks, where)
        if math.prod(shape) * ITEM_SIZES[dtype] > sum(chunk.length for chunk in chunks):
            # Each item holds its chunk's bytes: sizes beyond that are a lie, found before anyone allocates for them.
            raise CheckpointError(f"{where}: the files hold fewer bytes than its shape {shape} needs")
        return DistTensor(key, dtype, shape, tuple(sorted(chunks, key=lambda chunk: chunk.offsets)))

    def _item(self, tensor: DistTensor, chunk: DistChunk, fd: int) -> TensorItem:
        """The place of a chunk's bytes within its file, found once."""
        item = self._items.get((chunk.file, chunk.offset))
        if item is not None:
            return item
        where = f"{printable(chunk.file)}: item at byte {chunk.offset} (tensor {printable(tensor.key)})"

        def read(offset: int, nbytes: int) -> bytes:
            if offset < 0 or nbytes < 0 or offset + nbytes > chunk.length:
                raise CheckpointError(f"{where}: damaged archive")
            return pread_bytes(fd, nbytes, chunk.offset + offset, chunk.file)

        item = parse_item(read, chunk.length, where)
        if item.dtype != tensor.dtype or item.shape != chunk.sizes:
            raise CheckpointError(
                f"{where}: holds {item.dtype} {item.shape}, the metadata say {tensor.dtype} {chunk.sizes}"
            )
        outer = [(stride, size) for stride, size in zip(item.strides, item.shape, strict=True) if size > 1]
        if any(step < stride * size for (step, _), (stride, size) in pairwise(outer)) or any(s < 1 for s, _ in outer):
            raise CheckpointError(f"{where}: not stored row by row (strides {item.strides}), which is not supported")
        self._items[chunk.file, chunk.offset] = item
        return item

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """Fill `out` (contiguous, writable, of exactly that size) with rows [start, stop) of a tensor.

        Raises CheckpointError: no such tensor, rows that do not exist, a damaged item.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{printable(self.folder)}: has no tensor {printable(name)}")
        view = as_bytes(out)
        check_rows(name, tensor, start, stop, len(view))
        if not len(view):
            return
        size = ITEM_SIZES[tensor.dtype]
        for chunk in tensor.chunks:
            first, count = (chunk.offsets[0], chunk.sizes[0]) if tensor.shape else (0, 1)
            if first >= stop:
                break
            low, high = max(start, first), min(stop, first + count)
            if low >= high or 0 in chunk.sizes:
                continue
            with self._files.use(chunk.file) as fd:
                item = self._item(tensor, chunk, fd)
                base = chunk.offset + item.payload
                if chunk.sizes[1:] == tensor.shape[1:] and _is_contiguous(item):
                    step = row_bytes(tensor)
                    part = view[(low - start) * step : (high - start) * step]
                    pread_into(fd, part, base + (low - first) * step, chunk.file)
                    continue
                target = np.frombuffer(view, dtype=_UINT[size]).reshape(stop - start, *tensor.shape[1:])
                box = target[(slice(low - start, high - start), *map(_slice, chunk.offsets[1:], chunk.sizes[1:]))]
                self._read_box(fd, base + (low - first) * item.strides[0] * size, box, item.strides, chunk.file)

    def _read_box(self, fd: int, base: int, box: np.ndarray, strides: tuple[int, ...], path: Path) -> None:
        """Fill a strided view from elements that lie at `strides` behind byte `base`, through a small buffer."""
        size = box.itemsize
        inner = sum((count - 1) * stride for count, stride in zip(box.shape[1:], strides[1:], strict=True)) + 1
        if inner * size > _BOUNCE_BYTES and box.ndim > 1:
            for index in range(box.shape[0]):
                self._read_box(fd, base + index * strides[0] * size, box[index], strides[1:], path)
            return
        # Few rows of a wide item, or many of a narrow one: as many as fit between the first and the last byte.
        rows = max(1, (_BOUNCE_BYTES // size - inner) // max(strides[0], 1) + 1)
        for low in range(0, box.shape[0], rows):
            part = box[low : low + rows]
            span = (len(part) - 1) * strides[0] + inner
            bounce = self._bounce(span * size)
            pread_into(fd, bounce, base + low * strides[0] * size, path)
            flat = np.frombuffer(bounce, dtype=box.dtype)
            part[...] = np.lib.stride_tricks.as_strided(flat, part.shape, tuple(stride * size for stride in strides))

    def _bounce(self, nbytes: int) -> memoryview:
        have: bytearray = getattr(self._local, "bounce", bytearray())
        if len(have) < nbytes:
            have = self._local.bounce = bytearray(nbytes)
        return memoryview(have)[:nbytes]

    def check_items(self) -> Iterator[tuple[str, DistChunk, bool]]:
        """Read every item and compare its bytes with the CRC32 that its archive records: (key, chunk, ok).

        Checkpoints that this project wrote record it, and so does torch unless told otherwise. One buffer of memory.
        """
        buffer = memoryview(bytearray(_BOUNCE_BYTES))
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                crc, done = 0, 0
                with self._files.use(chunk.file) as fd:
                    item = self._item(tensor, chunk, fd)
                    while done < item.storage_bytes:
                        part = buffer[: item.storage_bytes - done]
                        pread_into(fd, part, chunk.offset + item.storage + done, chunk.file)
                        crc = zlib.crc32(part, crc)
                        done += len(part)
                yield key, chunk, crc == item.crc

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        self._files.close()


def is_dist_checkpoint(folder: str | Path) -> bool:
    """Whether a folder looks like a distributed checkpoint (it has both metadata files)."""
    return (Path(folder) / METADATA_FILE).is_file() and (Path(folder) / CONFIG_FILE).is_file()


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{printable(folder)}: not a folder")
    path = inside(folder, CONFIG_FILE)
    fd, size = open_regular(path)
    try:
        config = json.loads(pread_bytes(fd, min(size, 1 << 20), 0, path))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{printable(path)}: not JSON") from None
    finally:
        os.close(fd)
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != "torch_dist":
        raise CheckpointError(f"{printable(path)}: the format is {printable(backend)}, only torch_dist is read")


def _allowed(module: str, name: str) -> bool:
    return (module, name) in ALLOWED_GLOBALS or (module == "torch" and name in _TORCH_NAMES)


_TORCH_NAMES = {*DTYPE_OF_TORCH, "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}


def _state(node: Any, name: str, where: str) -> dict[str, Any]:
    """The fields of an object of the given class."""
    if not isinstance(node, Instance) or node.cls.name != name or not isinstance(node.state, DictItems):
        raise CheckpointError(f"{where}: damaged metadata (no {name})")
    return node.state.strings()


def _shape(node: Any, where: str) -> tuple[int, ...]:
    """A torch.Size of natural numbers."""
    if isinstance(node, Call) and node.func == Global("torch", "Size") and len(node.args) == 1:
        node = node.args[0]
    if type(node) not in (tuple, list) or len(node) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in node):
        raise CheckpointError(f"{where}: damaged metadata (no shape)")
    return tuple(node)


def _dtype(node: Any, where: str) -> str:
    state = node.state if isinstance(node, Instance) and node.cls.name == "TensorProperties" else None
    if isinstance(state, DictItems):
        state = (state.strings().get("dtype"),)
    dtype = state[0] if type(state) is tuple and state else None
    if not isinstance(dtype, Global):
        raise CheckpointError(f"{where}: damaged metadata (no dtype)")
    if dtype.name not in DTYPE_OF_TORCH:
        raise CheckpointError(f"{where}: the dtype {printable(dtype.name)} is not supported")
    return DTYPE_OF_TORCH[dtype.name]


def _places(
    storage: DictItems, select: Callable[[str], bool], where: str
) -> dict[str, dict[tuple[int, ...], tuple[str, int, int]]]:
    """key -> offsets of a chunk -> (file, offset, length)."""
    places: dict[str, dict[tuple[int, ...], tuple[str, int, int]]] = {}
    for index, info in storage.items:
        fields = _state(index, "MetadataIndex", where)
        key = fields.get("fqn")
        if type(key) is not str:
            raise CheckpointError(f"{where}: damaged metadata (no key)")
        if fields.get("offset") is None or not select(key):
            continue
        place = _state(info, "_StorageInfo", where)
        file, offset, length = (place.get(name) for name in ("relative_path", "offset", "length"))
        if type(file) is not str or type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise CheckpointError(f"{where}: damaged metadata (no place of {printable(key)})")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{where}: {printable(key)} is stored compressed, which is not supported")
        offsets = _shape(fields["offset"], where)
        if places.setdefault(key, {}).setdefault(offsets, (file, offset, length)) != (file, offset, length):
            raise CheckpointError(f"{where}: {printable(key)} has two places for its chunk at {offsets}")
    return places


def _check_cover(shape: tuple[int, ...], chunks: list[DistChunk], where: str) -> None:
    """The chunks must cover the shape once: Megatron's own loader does not notice a hole."""
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise CheckpointError(f"{where}: a chunk with {len(chunk.sizes)} axes in a shape of {len(shape)}")
        if any(o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise CheckpointError(f"{where}: the chunk at {chunk.offsets} reaches beyond the shape {shape}")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise CheckpointError(f"{where}: its chunks leave holes or overlap")
    solid = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    cuts = [
        sorted({0, *(c.offsets[a] for c in solid), *(c.offsets[a] + c.sizes[a] for c in solid)})
        for a in range(len(shape))
    ]
    if math.prod(map(len, cuts)) > _MAX_CELLS:
        raise CheckpointError(f"{where}: cut too irregularly to be checked")
    # On the grid of all cuts a chunk is a block of cells; the volumes agree, so it is enough that none is hit twice.
    grid = np.zeros([max(len(edges) - 1, 0) for edges in cuts], dtype=np.uint8)
    at = [{value: i for i, value in enumerate(edges)} for edges in cuts]
    for chunk in solid:
        block = tuple(
            slice(at[a][o], at[a][o + n]) for a, (o, n) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
        )
        if grid[block].any():
            raise CheckpointError(f"{where}: the chunk at {chunk.offsets} overlaps another")
        grid[block] = 1


def _is_contiguous(item: TensorItem) -> bool:
    expected = contiguous_strides(item.shape)
    return all(n == 1 or a == b for n, a, b in zip(item.shape, item.strides, expected, strict=True))


def _slice(offset: int, size: int) -> slice:
    return slice(offset, offset + size)
