"""What a Megatron checkpoint remembers of the HF folder that it came from, so that export needs nothing else.

A Megatron folder holds, beside the weights in `release/` (or `iter_*/` when a trainer wrote it), a folder `hf/`:
config, tokenizer and every other asset as they were, `bridge.json` (this manifest), and in `hf/carried/` the tensors
that the model does not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError
from bridge.geometry import Geometry
from bridge.hf.json_file import read_object
from bridge.hf.tensors import ITEM_SIZES, printable
from bridge.hf.writer import write_text
from bridge.torch_dist.reader import is_dist_checkpoint

HF_FOLDER = "hf"
CARRIED_FOLDER = "carried"
MANIFEST_FILE = "bridge.json"
# Beside the checkpoints of adapters: what they adapt (bridge/lora/checkpoint.py).
ADAPTER_FILE = "adapter.json"
RELEASE_FOLDER = "release"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
_VERSION = 1
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class ManifestTensor:
    """A tensor of the HF folder as export writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """`tied`: whether the head shares the embedding, which a folder can decide differently from its config.

    `tensors`: of the HF folder, in order. `file_metadata`: what the safetensors headers say beside tensors.
    """

    tied: bool
    tensors: tuple[ManifestTensor, ...]
    file_metadata: Mapping[str, str] = field(default_factory=dict)
    version: int = _VERSION

    def write(self, folder: Path) -> None:
        """Write `bridge.json` into `folder`."""
        write_text(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `bridge.json` of `folder`. Raises CheckpointError."""
        path = folder / MANIFEST_FILE
        if not path.exists():
            raise CheckpointError(f"{path}: not found; was this Megatron checkpoint made by `import`?")
        data = read_object(path)
        version = data.get("version")
        if type(version) is not int or version != _VERSION:
            raise CheckpointError(f"{path}: version {printable(str(version))}, this program reads {_VERSION}")
        try:
            return cls._of(data)
        except ValueError as error:
            raise CheckpointError(f"{path}: not a manifest: {error}") from None

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises ValueError that names the key."""
        _check_keys(data, {f.name for f in fields(cls)}, "the manifest")
        tied, listed, metadata = data["tied"], data["tensors"], data["file_metadata"]
        if not isinstance(tied, bool):
            raise ValueError("tied is neither true nor false")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("file_metadata is not an object of texts")
        if not isinstance(listed, list):
            raise ValueError("tensors is not a list")
        tensors = tuple(_tensor(entry) for entry in listed)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise ValueError("tensors names one of them twice")
        return cls(tied, tensors, metadata)


def _check_keys(data: Mapping[str, Any], expected: Set[str], what: str) -> None:
    for key in sorted(expected ^ set(data)):
        raise ValueError(f"{what} {'lacks' if key in expected else 'has the unknown key'} {printable(key)}")


def _tensor(entry: Any) -> ManifestTensor:
    if not isinstance(entry, dict):
        raise ValueError("tensors has an entry that is no object")
    name = entry.get("name")
    _check_keys(entry, {f.name for f in fields(ManifestTensor)}, f"tensor {printable(name)}")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"tensor {printable(name)}: its name or dtype")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tensor {printable(name)}: its shape")
    return ManifestTensor(name, dtype, tuple(shape))


@dataclass(frozen=True)
class MegatronFolder:
    """A Megatron checkpoint on disk: its weights folder, its `hf/` folder, and what they say."""

    path: Path
    weights: Path
    hf: Path
    manifest: Manifest
    geometry: Geometry

    @classmethod
    def open(cls, path: str | Path) -> MegatronFolder:
        """Find the parts of a checkpoint; of a training run the latest complete one. Raises CheckpointError.

        `path` is the whole folder, or one of the checkpoints in it (`RUN/iter_0000020`).
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder")
        if is_dist_checkpoint(path) and (path.absolute().parent / HF_FOLDER / MANIFEST_FILE).is_file():
            path, weights = path.absolute().parent, path
        else:
            weights = _find_weights(path)
        hf = path / HF_FOLDER
        manifest = Manifest.read(hf)
        names = {tensor.name for tensor in manifest.tensors}
        geometry = replace(Geometry.from_folder(hf), tied=manifest.tied).named_as_in(names)
        return cls(path, weights, hf, manifest, geometry)

    @property
    def carried(self) -> Path | None:
        """The folder of carried tensors, if there are any."""
        folder = self.hf / CARRIED_FOLDER
        return folder if folder.is_dir() else None


def is_megatron_folder(path: str | Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint rather than an HF one."""
    path = Path(path)
    return (path / TRACKER_FILE).exists() or (path / HF_FOLDER / MANIFEST_FILE).exists() or is_dist_checkpoint(path)


def _find_weights(path: Path) -> Path:
    for name in _candidates(path):
        if is_dist_checkpoint(path / name):
            return path / name
    hint = ""
    for file, command in (("config.json", "import"), ("adapter_config.json", "adapter import")):
        if (path / file).is_file():
            hint = f"; `{command}` makes one of this Hugging Face folder"
    raise CheckpointError(f"{path}: holds no complete distributed checkpoint ({RELEASE_FOLDER}/ or iter_*/){hint}")


def _candidates(path: Path) -> Sequence[str]:
    """Checkpoint folders, the one the tracker names first, then the latest."""
    names: list[str] = []
    tracker = path / TRACKER_FILE
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text == RELEASE_FOLDER:
            names.append(text)
        elif text.isdecimal():
            names.append(f"iter_{int(text):07d}")
        else:
            raise CheckpointError(f"{tracker}: says {text[:40]!r}, expected a number or {RELEASE_FOLDER!r}")
    found = sorted(
        (int(match[1]), entry.name) for entry in path.iterdir() if (match := _ITERATION.fullmatch(entry.name))
    )
    return [*names, *(name for _, name in reversed(found)), RELEASE_FOLDER]
