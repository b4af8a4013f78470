"""A text model back in the multimodal folder that it came from: its towers, its config, what its processor reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bridge.convert.atomic import Notify
from bridge.convert.folders import SourceFolder, open_source, with_dtype
from bridge.convert.pieces import CopyTensor, PlannedReader, same_tensors
from bridge.convert.plan import JoinedReader
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.geometry.towers import TOWERS
from bridge.hf.json_file import read_object
from bridge.hf.tensors import RowReader
from bridge.mapping import Table, table_for

# What a multimodal model has besides its language model, and what the classes are called.
_OF_THE_CLASS = {"architecture", "multimodal", "placeholders", *TOWERS, "drafter", "base", "notices"}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class WholeModel:
    """The folder that is to be written. `assets`: of `folder`, relative to it. `config`: where it is not as there."""

    reader: RowReader
    tensors: tuple[CopyTensor, ...]
    table: Table
    files: list[Path]
    folder: Path
    assets: list[Path]
    config: dict[str, Any] | None


def open_whole(
    stack: ExitStack,
    path: str | Path,
    geometry: Geometry,
    language: Sequence[CopyTensor],
    reader: RowReader,
    notify: Notify | None = None,
) -> WholeModel:
    """The multimodal folder `path` with another language model: `language`, which `reader` has, of `geometry`.

    Where every tensor of it has one dtype, the towers are written in it too, as an import with that dtype would.
    Raises UsageError where the folder has no towers, the model has its own, or the two language models differ in kind.
    """
    source = open_source(stack, path)
    _check_same_kind(source.geometry, geometry, path)
    table, prefix, ours = table_for(source.geometry), source.geometry.prefix, geometry.prefix
    dtypes = {tensor.dtype for tensor in language if tensor.dtype in _NAMES}
    dtype = dtypes.pop() if len(dtypes) == 1 else None

    def named(tensor: CopyTensor) -> CopyTensor:
        name = tensor.name
        return replace(tensor, name=prefix + name.removeprefix(ours) if name.startswith(ours) else name)

    renamed = [named(tensor) for tensor in language]
    # A copy of the embedding under the head's name would be the old one: transformers would load the folder untied.
    replaced = {tensor.name for tensor in renamed} | set(table.copies)
    rest = [
        replace(tensor, dtype=dtype) if dtype is not None and tensor.dtype in _NAMES else tensor
        for tensor in same_tensors(source.folder)
        if tensor.name not in replaced
    ]
    reader_of_all = JoinedReader([PlannedReader(renamed, reader), PlannedReader(rest, source.folder)])
    places = {name: place for place, name in enumerate(source.folder.tensors)}
    tensors = sorted(same_tensors(reader_of_all), key=lambda tensor: places.get(tensor.name, len(places)))
    config = source.config or read_object(source.folder.path / "config.json")
    written = config if dtype is None else with_dtype(config, _NAMES[dtype])
    changed = written if source.config is not None or written != config else None
    if notify is not None:
        _say(source, rest, dtype, notify)
    files, assets = list(source.folder.files), list(source.folder.assets)
    return WholeModel(reader_of_all, tuple(tensors), table, files, source.folder.path, assets, changed)


def _say(source: SourceFolder, rest: Sequence[CopyTensor], dtype: str | None, notify: Notify) -> None:
    for notice in source.notices:
        notify(notice)
    stored = source.folder.tensors
    changed = sorted({stored[tensor.name].dtype for tensor in rest if stored[tensor.name].dtype != tensor.dtype})
    if changed:
        notify(
            f"{source.folder.path}: what is no part of the language model is {', '.join(changed)} there, and written "
            f"as {dtype}, the dtype of the checkpoint"
        )


def _check_same_kind(whole: Geometry, text: Geometry, path: str | Path) -> None:
    """Raise UsageError that names what does not fit."""
    if text.multimodal or text.drafter is not None:
        raise UsageError("--multimodal is for a text model: this checkpoint is none")
    if not whole.multimodal:
        raise UsageError(f"{path}: has no towers to go with a text model; --multimodal names a multimodal folder")
    for item in fields(Geometry):
        if item.name in _OF_THE_CLASS:
            continue
        theirs, ours = getattr(whole, item.name), getattr(text, item.name)
        if theirs != ours:
            values = f" ({theirs} there, {ours} here)" if item.name != "layers" else ""
            raise UsageError(f"{path}: its language model is another one: {item.name} differs{values}")
