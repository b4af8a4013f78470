"""A Hugging Face model folder on disk: validated safetensors headers, rows read on demand, the files beside them.

Weights are safetensors only; a pickle is never opened. Nothing in a header is believed before it is checked, so that a
damaged or hostile folder ends in one CheckpointError and not in a crash, a hang or a read outside the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.close_on_exit import CloseOnExit
from bridge.errors import CheckpointError
from bridge.hf.descriptors import RegularFiles
from bridge.hf.json_file import parse_object, read_object
from bridge.hf.tensors import (
    ITEM_SIZES,
    TensorLike,
    as_bytes,
    check_link,
    check_rows,
    inside,
    num_rows,
    pread_bytes,
    pread_into,
    printable,
    row_bytes,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The bound of the safetensors format itself.
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 16
# What stands in a clone whose large files were not fetched.
_POINTER = b"version https://git-lfs"
_MAX_BYTES = 2**62
# Other formats of the same weights: neither read nor copied along.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite"}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the folder. `offset` is in bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class HfFolder(CloseOnExit):
    """An open HF model folder. Thread-safe; a context manager.

    `assets`: every file that is not weights, relative to the folder, sorted. `ignored`: weight files that the model
    does not consist of (another format, a stray shard), and the files that go with them: they are carried nowhere, and
    whoever copies the folder says so.
    `file_metadata`: `__metadata__` of the first weight file. `files`: the weight files. `single`: what the weight file
    is called where there is one only, and `index` that of several. `config`: what stands for config.json where the file
    says more than is meant (of weights that are read as if they were not quantized), else None.

    Raises CheckpointError that names the file or tensor at fault.
    """

    def __init__(self, path: str | Path, *, single: str = SINGLE_FILE, index: str = INDEX_FILE) -> None:
        self.path = Path(path)
        self._single, self._index = single, index
        self._stored: dict[str, TensorInfo] = {}
        self.config: dict[str, Any] | None = None
        self.file_metadata: dict[str, str] = {}
        self.files: list[Path] = []
        self._open = RegularFiles()
        if not self.path.is_dir():
            raise CheckpointError(f"{printable(self.path)}: not a folder")
        try:
            self._open_weights()
            self.assets, self.ignored = _list_assets(self.path, set(self.files))
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorLike]:
        """By name, in the order of the files and of their headers."""
        return self._stored

    def _open_weights(self) -> None:
        single, index = self.path / self._single, self.path / self._index
        if os.path.lexists(single) and os.path.lexists(index):
            raise CheckpointError(
                f"{printable(self.path)}: has both {single.name} and {index.name}; remove the wrong one"
            )
        if os.path.lexists(single):
            self._open_file(inside(self.path, single.name), None)
            return
        if not os.path.lexists(index):
            for name in _PICKLES:
                if (self.path / name).exists():
                    raise CheckpointError(
                        f"{printable(self.path)}: has only {name}, a pickle, which is not read; convert it first"
                    )
            raise CheckpointError(f"{printable(self.path)}: has neither {single.name} nor {index.name}")
        weight_map = _read_index(inside(self.path, index.name))
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, set()).add(name)
        for file, names in by_file.items():
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{printable(index)}: names {printable(file)}, which is not a safetensors file")
            self._open_file(inside(self.path, file), names)

    def _open_file(self, path: Path, listed: set[str] | None) -> None:
        """Read one header; `listed` are the tensors that the index expects in the file."""
        if path in self.files:
            raise CheckpointError(f"{printable(path)}: named twice by the index")
        with self._open.use(path) as fd:
            self.files.append(path)
            tensors, metadata = _read_header(fd, self._open.size(path), path)
        if len(self.files) == 1:
            self.file_metadata = metadata
        if listed is not None:
            for name in listed - tensors.keys():
                raise CheckpointError(
                    f"{printable(path)}: lacks the tensor {printable(name)} that the index lists there"
                )
            for name in tensors.keys() - listed:
                raise CheckpointError(
                    f"{printable(path)}: holds the tensor {printable(name)} that the index does not list there"
                )
        self._stored.update(tensors)

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """Fill `out` (contiguous, writable, of exactly that size) with rows [start, stop) of a tensor.

        Raises CheckpointError: no such tensor, rows that do not exist, a file that became shorter.
        """
        info = self._stored.get(name)
        if info is None:
            raise CheckpointError(f"{printable(self.path)}: has no tensor {printable(name)}")
        view = as_bytes(out)
        check_rows(name, info, start, stop, len(view))
        with self._open.use(info.file) as fd:
            pread_into(fd, view, info.offset + start * row_bytes(info), info.file)

    def read_columns(self, name: str, start: int, stop: int, first: int, last: int, out: Any) -> None:
        """Fill `out` with elements [first, last) of each of the rows [start, stop); nothing else is read.

        Raises CheckpointError like `read_rows`.
        """
        info = self._stored.get(name)
        if info is None:
            raise CheckpointError(f"{printable(self.path)}: has no tensor {printable(name)}")
        view, whole = as_bytes(out), row_bytes(info)
        item = ITEM_SIZES[info.dtype]
        width = (last - first) * item
        rows = num_rows(info.shape)
        if (
            not (0 <= start <= stop <= rows and 0 <= first < last <= whole // item)
            or len(view) != (stop - start) * width
        ):
            raise CheckpointError(
                f"tensor {printable(name)}: rows {start} to {stop}, elements {first} to {last} of "
                f"{rows} x {whole // item}"
            )
        base = info.offset + first * item
        with self._open.use(info.file) as fd:
            for row in range(start, stop):
                at = (row - start) * width
                pread_into(fd, view[at : at + width], base + row * whole, info.file)

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        self._open.close()


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{printable(path)}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{printable(path)}: weight_map gives no file name for {printable(name)}")
    return weight_map


def _read_header(fd: int, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if size < 8:
        raise CheckpointError(f"{printable(path)}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(pread_bytes(fd, 8, 0, path), "little")
    if length.to_bytes(8, "little") == _POINTER[:8]:
        raise CheckpointError(f"{printable(path)}: a pointer of Git LFS, not the weights; `git lfs pull` fetches them")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{printable(path)}: header of {length} bytes, more than the format allows")
    if 8 + length > size:
        raise CheckpointError(f"{printable(path)}: header of {length} bytes in a file of {size}: truncated")
    data = pread_bytes(fd, length, 8, path)
    if not data.startswith(b"{"):
        raise CheckpointError(f"{printable(path)}: header does not start with '{{'")
    header = parse_object(data, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{printable(path)}: __metadata__ is not an object of strings")
    base, tensors = 8 + length, {}
    for name, entry in header.items():
        tensors[name] = _read_entry(name, entry, base, path)
    _check_layout(tensors, base, size, path)
    return tensors, metadata


def _read_entry(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    where = f"{printable(path)}: tensor {printable(name)}"
    if not name:
        raise CheckpointError(f"{printable(path)}: a tensor has no name")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where}: dtype {printable(dtype)} is not supported")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: shape is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets are not a begin and an end")
    nbytes = ITEM_SIZES[dtype]
    for size in shape:
        # Checked at every step: the product of hostile sizes is itself a number of arbitrary length.
        nbytes *= size
        if nbytes > _MAX_BYTES:
            raise CheckpointError(f"{where}: shape is larger than any file")
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes of data, its dtype and shape need {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


def _check_layout(tensors: dict[str, TensorInfo], base: int, size: int, path: Path) -> None:
    """The data of the tensors must fill the file, without holes and without overlaps."""
    end = base
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise CheckpointError(f"{printable(path)}: tensor {printable(info.name)} overlaps the one before it")
        if info.offset > end:
            raise CheckpointError(
                f"{printable(path)}: a hole of {info.offset - end} bytes before tensor {printable(info.name)}"
            )
        end = info.offset + info.nbytes
        if end > size:
            raise CheckpointError(
                f"{printable(path)}: tensor {printable(info.name)} ends at byte {end}, the file at {size}: truncated"
            )
    if end != size:
        raise CheckpointError(f"{printable(path)}: {size - end} bytes behind the last tensor")


def _list_assets(folder: Path, weights: set[Path]) -> tuple[list[Path], list[Path]]:
    """(files to carry along, files to leave), relative and sorted.

    Left are weights that are not the model's, and what would be wrong without them: a subfolder that holds some (of
    another format, of a trainer) as a whole, and a JSON file at the top that names one.
    """
    assets: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder):
        # Hidden folders are caches and version control, not part of the model.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise CheckpointError(f"{printable(Path(parent) / name)}: a linked folder, which is not followed")
        for name in names:
            path = Path(parent) / name
            if path in weights or (name == INDEX_FILE and parent == str(folder)):
                continue
            (others if _is_weights(name) else assets).append(path.relative_to(folder))
    foreign = {path.parts[0] for path in others if len(path.parts) > 1}
    named = [f'"{path.name}"'.encode() for path in others if len(path.parts) == 1]
    carried = []
    for asset in assets:
        path = folder / asset
        if asset.parts[0] in foreign:
            others.append(asset)
            continue
        check_link(folder, path)
        if not path.is_file():
            raise CheckpointError(f"{printable(path)}: neither a file nor a folder")
        if len(asset.parts) == 1 and asset.suffix == ".json" and _mentions(path, named):
            if asset.name == "config.json":
                raise CheckpointError(f"{printable(path)}: names a weight file that is not the model's")
            others.append(asset)
            continue
        carried.append(asset)
    return sorted(carried), sorted(others)


def _is_weights(name: str) -> bool:
    return Path(name).suffix in _WEIGHT_SUFFIXES or name.endswith(tuple(f"{s}.index.json" for s in _WEIGHT_SUFFIXES))


def _mentions(path: Path, names: list[bytes]) -> bool:
    if not names:
        return False
    data = path.read_bytes()
    return any(name in data for name in names)
