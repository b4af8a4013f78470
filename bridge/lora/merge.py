"""Base and adapter as one Hugging Face folder: W + scaling · B A in float32, rounded once to the dtype of W.

With DoRA each row of that (of an embedding: each column) is brought to the norm that its magnitude says, by a factor
magnitude / norm that is 1 where training began: the norm is rounded as it was there, and as PEFT's merge rounds it.

The copy of an export, with a reader between that adds the adapter to the rows that pass by: memory depends on the chunk
and on one adapter, and a tensor that is not adapted is copied byte by byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.convert.atomic import Notify, check_apart, staged
from bridge.convert.export import open_checkpoint
from bridge.convert.folders import (
    DEFAULT_SHARD_BYTES,
    Conversion,
    compare_assets,
    copy_assets,
    listed_assets,
    open_source,
)
from bridge.convert.manifest import MegatronFolder, is_megatron_folder
from bridge.convert.pieces import PlannedReader, plan_digest, same_tensors
from bridge.convert.quantized_export import QuantizedReader
from bridge.convert.quantized_folder import DequantizedFolder
from bridge.convert.stream import CHUNK_BYTES, Progress, copy
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import CheckpointError, MappingError
from bridge.hf.folder import HfFolder
from bridge.hf.json_file import read_object
from bridge.hf.tensors import RowReader, TensorLike, as_bytes, num_rows
from bridge.hf.writer import HfWriter
from bridge.lora.adapter import Adapter
from bridge.lora.spec import Target
from bridge.mapping import Table, table_for

_FLOATS = ("BF16", "F16", "F32")
# Adapters kept at hand: the copy's threads may be at the end of one tensor and at the beginning of the next.
_KEPT = 2
# How much of an embedding is read at once to find its norms.
_ROWS = 8192


@dataclass(frozen=True)
class Base:
    """A model to merge into: its tensors by their Hugging Face names, and the files that go beside them.

    `config`: what config.json is to say, where not what the one among `assets` does.
    """

    path: Path
    table: Table
    reader: RowReader
    files: tuple[Path, ...]
    assets_folder: Path
    assets: tuple[Path, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None


def open_base(stack: ExitStack, path: Path) -> Base:
    """Open a Hugging Face or a Megatron folder. Raises a BridgeError that names what is wrong with it."""
    if is_megatron_folder(path):
        checkpoint = MegatronFolder.open(path)
        reader, tensors, files = open_checkpoint(stack, checkpoint)
        return Base(
            checkpoint.path,
            table_for(checkpoint.geometry),
            PlannedReader(tensors, reader),
            tuple(files),
            checkpoint.hf,
            tuple(listed_assets(checkpoint.hf)),
            checkpoint.manifest.file_metadata,
        )
    source = open_source(stack, path)
    folder: HfFolder = source.folder
    source.table.check_folder({name: info.shape for name, info in folder.tensors.items()}, path)
    return Base(
        folder.path,
        source.table,
        folder,
        tuple(folder.files),
        folder.path,
        tuple(folder.assets),
        folder.file_metadata,
        folder.config,
    )


@dataclass(frozen=True)
class Factors:
    """The tensors of one target in float32. `column_scale` [hidden]: of an embedding with DoRA.

    `norm_dtype`: that of the weight promoted by that of its factors. Of a weight that was trained whole, `a` is that,
    as it is stored, and there is no `b`. `of` makes them of canonical tensors, in the order of the target's parts.
    """

    target: Target
    norm_dtype: torch.dtype
    a: Tensor
    b: Tensor | None = None
    magnitude: Tensor | None = None
    column_scale: Tensor | None = None

    @classmethod
    def of(cls, target: Target, weight_dtype: torch.dtype, values: Sequence[Tensor]) -> Factors:
        first, *rest = values
        whole = first if target.kind == "saved" else first.float()
        return cls(target, torch.promote_types(weight_dtype, first.dtype), whole, *(value.float() for value in rest))

    def with_column_norms(self, base: Iterable[tuple[int, Tensor]]) -> Factors:
        """What an embedding with DoRA needs: `base` are all of its rows, (first row, rows)."""
        squares = torch.zeros(self.target.shape[1], dtype=torch.float64, device=self.a.device)
        for start, rows in base:
            squares += self.added(rows, start, start + len(rows)).square().sum(0)
        return replace(self, column_scale=self.scale(squares.sqrt().float()))

    def merged(self, weight: Tensor, start: int) -> Tensor:
        """Rows of the base, from `start` on, with the adapter in them: float32 (or as trained whole)."""
        merged = self.added(weight, start, start + len(weight))
        if self.column_scale is not None:
            merged *= self.column_scale
        elif self.magnitude is not None:
            merged *= self.scale(torch.linalg.norm(merged, dim=1), start)[:, None]
        return merged

    def scale(self, norms: Tensor, start: int = 0) -> Tensor:
        """What DoRA multiplies rows (of an embedding: columns) by that begin at `start` and have those norms [n]."""
        assert self.magnitude is not None
        return self.magnitude[start : start + len(norms)] / norms.to(self.norm_dtype).float()

    def added(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the base and what the factors add to them, float32; as in PEFT the product is scaled, then added.

        Or what was trained in their place.
        """
        a, b = self.a, self.b
        if b is None:
            return a[start:stop]
        if self.target.kind == "embedding":
            delta = (b @ a[:, start:stop]).T
        else:
            delta = b[start:stop] @ (a[start:stop] if self.target.kind == "experts" else a)
        return weight.float() + delta * self.target.scaling


class MergedReader:
    """The rows of a base with an adapter added. Thread-safe.

    Raises MappingError: an adapter of a tensor that the base does not have, or has in another shape.
    """

    def __init__(self, base: RowReader, table: Table, adapter: Adapter) -> None:
        self.tensors: Mapping[str, TensorLike] = base.tensors
        self._base, self._adapter = base, adapter
        self._lock = threading.Lock()
        self._factors: dict[str, Factors] = {}
        self._targets: dict[str, Target] = {target.name: target for target in adapter.targets}
        for target in adapter.targets:
            # A tied head that is written out is the embedding once more.
            self._targets |= {copied: target for copied in table.copies_of(target.name) if copied in base.tensors}
        for name, target in self._targets.items():
            found = base.tensors.get(name)
            if found is None or tuple(found.shape) != target.shape:
                have = "lacks it" if found is None else f"has {list(found.shape)}"
                raise MappingError(f"{adapter.path}: adapts {name} {list(target.shape)}; the base {have}")
            if found.dtype not in _FLOATS:
                raise MappingError(f"{name}: {found.dtype}, to which no adapter can be added")

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        self._base.read_rows(name, start, stop, out)
        target = self._targets.get(name)
        if target is None or stop == start:
            return
        weight = torch.frombuffer(as_bytes(out), dtype=TORCH_DTYPES[self.tensors[name].dtype])
        weight = weight.view(stop - start, *target.shape[1:])
        weight.copy_(self._of(target).merged(weight, start))

    def _of(self, target: Target) -> Factors:
        with self._lock:
            if target.name not in self._factors:
                while len(self._factors) >= _KEPT:
                    del self._factors[next(iter(self._factors))]
                dtype = TORCH_DTYPES[self.tensors[target.name].dtype]
                factors = Factors.of(target, dtype, [self._adapter.value(target, part) for part in target.parts])
                if target.kind == "embedding" and factors.magnitude is not None:
                    factors = factors.with_column_norms(self._base_rows(target))
                self._factors[target.name] = factors
            return self._factors[target.name]

    def _base_rows(self, target: Target) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of all of a tensor without its adapter."""
        rows = target.shape[0]
        for start in range(0, rows, _ROWS):
            yield start, _rows(self._base, target.name, start, min(start + _ROWS, rows))


def merge_adapter(
    base: Base,
    adapter: Adapter,
    hf_dir: str | Path,
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    quantize: str | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
    workers: int = 2,
) -> Conversion:
    """Write base and adapter as a Hugging Face folder. Raises a BridgeError; the target is then as it was before.

    `quantize` as of `export_hf`: what is quantized is the sum, rounded to the dtype of the base. Linears of a quantized
    base that have no adapter keep its bytes, where they are stored so.
    """
    reader: RowReader = MergedReader(base.reader, base.table, adapter)
    check_copies(adapter, base.reader)
    say_notes(adapter, base.assets_folder, notify)
    check_apart(Path.cwd() / hf_dir, adapter.path)
    config = base.config
    if quantize is not None:
        origin = base.reader if isinstance(base.reader, DequantizedFolder) else None
        reader = quantized = QuantizedReader(reader, base.table, quantize, origin, workers)
        plain = read_object(base.assets_folder / "config.json") if config is None else config
        config = quantized.config(plain, notify)
    tensors = same_tensors(reader)
    for target in adapter.targets:
        if notify is not None and target.kind == "embedding" and base.table.copies_of(target.name):
            # PEFT warns of it and does the same.
            notify(f"{target.module} is tied to the head, which gets its adapter too: in training it had none")
    with ExitStack() as stack:
        stage = stack.enter_context(
            staged(
                hf_dir,
                plan=plan_digest(tensors, "merge", quantize or "", adapter.spec.to_json(), max_shard_size, CHUNK_BYTES),
                sources=[*base.files, *adapter.files, *(base.assets_folder / asset for asset in base.assets)],
                source_folder=base.path,
                needed_bytes=sum(tensor.spec.nbytes for tensor in tensors),
                overwrite=overwrite,
                notify=notify,
            )
        )
        specs = [tensor.spec for tensor in tensors]
        writer = stack.enter_context(HfWriter(stage.folder, specs, max_shard_size, base.metadata or None))
        result = copy(tensors, reader, writer, journal=stage.journal, progress=progress, workers=workers)
        writer.finish()
        copy_assets(base.assets_folder, list(base.assets), stage.folder, config)
        return Conversion(Path(hf_dir), len(tensors), result.bytes_total, result.bytes_resumed)


def check_copies(adapter: Adapter, base: RowReader) -> None:
    """Raise CheckpointError where a weight of the base that is stored beside the factors is not what the base has."""
    for copied in adapter.copies:
        ours, theirs = base.tensors[copied.name], copied.reader.tensors[copied.key]
        rows = num_rows(tuple(ours.shape))
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            pair = [
                _rows(reader, name, start, stop) for reader, name in ((base, copied.name), (copied.reader, copied.key))
            ]
            if not torch.equal(*pair):
                raise CheckpointError(
                    f"{adapter.path}: {copied.key} ({theirs.dtype}) is not the {copied.name} ({ours.dtype}) of this "
                    "base: trained on another one; or trained as well, and then modules_to_save has to name it, with "
                    "ensure_weight_tying where the head is tied to it"
                )


def _rows(reader: RowReader, name: str, start: int, stop: int) -> Tensor:
    info = reader.tensors[name]
    rows = torch.empty((stop - start, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
    reader.read_rows(name, start, stop, rows.view(torch.uint8).numpy())
    return rows.float()


def say_notes(adapter: Adapter, assets: Path, notify: Notify | None) -> None:
    """Say what was left out of an adapter; `assets`: the folder whose tokenizer is used in the place of its own."""
    if notify is None:
        return
    for note in adapter.notes:
        notify(note)
    home = adapter.assets_folder
    if home is not None and home != assets:
        other = compare_assets(assets, home, list(adapter.assets))
        if other:
            notify(f"{home}: {', '.join(other)} differ from those of the base, which are used")
