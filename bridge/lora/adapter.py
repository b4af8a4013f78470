"""An adapter somewhere on a disk, whatever the format: what it adapts, and its tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from bridge.errors import CheckpointError
from bridge.hf.tensors import RowReader
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.mapping import Table


@dataclass(frozen=True)
class BaseCopy:
    """A weight of the base that is stored beside its factors: `key` of `reader` is `name` on disk in the base."""

    name: str
    key: str
    reader: RowReader


@dataclass(frozen=True)
class Adapter:
    """An open adapter of the model that `table` is of.

    `value(target, part)` reads one canonical tensor, of the shape `target.shape_of(part)` and the dtype
    `dtype(target, part)` (a safetensors name); asked for in the order of `targets` and their `parts`, nothing is read
    twice.
    `files` are those it is read from. `base` is where the model is that it adapts, if that is known: a Hugging Face
    folder or hub id, or a Megatron folder. `notes`: what was left out or read otherwise than it is written, for whoever
    uses the adapter to say. `assets`: what tokenizes and renders for the model, relative to `assets_folder`.
    `copies`: what has to be the same in the base; `revision`: of a base on the hub.
    """

    path: Path
    table: Table
    spec: LoraSpec
    targets: tuple[Target, ...]
    value: Callable[[Target, Factor], Tensor]
    dtype: Callable[[Target, Factor], str]
    files: tuple[Path, ...]
    base: str | None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    assets_folder: Path | None = None
    assets: tuple[Path, ...] = ()
    copies: tuple[BaseCopy, ...] = ()

    def common_dtype(self) -> str:
        """The dtype of all but whole weights. Raises CheckpointError where they differ: an adapter here has one."""
        first: dict[str, str] = {}
        for target in (target for target in self.targets if target.kind != "saved"):
            for part in target.parts:
                first.setdefault(self.dtype(target, part), f"{part} of {target.module}")
        if len(first) != 1:
            listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(first.items()))
            raise CheckpointError(f"{self.path}: tensors of several dtypes, {listed}; an adapter here has one")
        return next(iter(first))


# Files that AutoTokenizer and AutoProcessor read. Not config.json, which would make a model of the folder.
_ASSETS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*", "*processor_config.json"),
)


def adapter_assets(files: Iterable[Path]) -> tuple[Path, ...]:
    """Those of a model's files, relative to its folder, that belong beside an adapter as well."""
    return tuple(file for file in files if any(fnmatch(file.as_posix(), pattern) for pattern in _ASSETS))
