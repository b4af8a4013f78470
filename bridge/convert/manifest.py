"""What a Megatron checkpoint remembers of the HF folder that it came from, so that export needs nothing else.

A Megatron folder holds, beside the weights in `release/` (or `iter_*/` when a trainer wrote it), a folder `hf/`:
config, tokenizer and every other asset as they were, `bridge.json` (this manifest), and in `hf/carried/` the tensors
that the model does not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bridge.errors import CheckpointError
from bridge.geometry import Geometry
from bridge.hf.tensors import ITEM_SIZES
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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["version"]
            tensors = tuple(_tensor(entry) for entry in data["tensors"])
            manifest = cls(bool(data["tied"]), tensors, dict(data["file_metadata"]), version)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; was this Megatron checkpoint made by `import`?") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
        if version != _VERSION:
            raise CheckpointError(f"{path}: version {version}, this program reads {_VERSION}")
        return manifest


def _tensor(entry: Mapping[str, object]) -> ManifestTensor:
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or dtype not in ITEM_SIZES or not isinstance(shape, list):
        raise ValueError(f"tensor {name!r}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape of {name!r}")
    return ManifestTensor(name, str(dtype), tuple(shape))


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
        geometry = replace(Geometry.from_folder(hf), tied=manifest.tied)
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
