"""A live, sharded model as a complete HF folder, written by rank 0 in bounded chunks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bridge.convert.atomic import staged
from bridge.convert.dtypes import FLOATS
from bridge.convert.folders import copy_assets, listed_assets, with_dtype
from bridge.convert.live import CHUNK_BYTES, Gatherer, by_source
from bridge.convert.manifest import MegatronFolder
from bridge.convert.pieces import CopyTensor, Piece, PlannedReader
from bridge.convert.quantized_folder import open_hf_folder
from bridge.convert.torch_dtypes import DTYPE_NAMES
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import TensorSpec, num_rows, row_bytes
from bridge.hf.writer import HfWriter, write_text
from bridge.mapping import Table
from bridge.together import together


class Origin(Protocol):
    """What a live model was made of, a Hugging Face folder or a Megatron checkpoint: a `Gemma4Bridge`."""

    @property
    def table(self) -> Table: ...

    @property
    def hf_dir(self) -> Path | None: ...

    @property
    def megatron(self) -> MegatronFolder | None: ...


def save_live(gatherer: Gatherer, origin: Origin, target: Path, max_shard_size: int, overwrite: bool) -> None:
    """Rank 0 writes what `gatherer` gathers. Every rank takes part, and raises what any of them does."""
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with ExitStack() as stack:
        folder: _Folder | None = None
        with together():
            if writes:
                folder = _Folder(stack, gatherer, origin, target, max_shard_size, overwrite)
        for key, start, stop in _chunks(gatherer):
            rows = gatherer.rows(key, start, stop, ranks=(0,))
            with together():
                if folder is not None and rows is not None:
                    folder.write(key, start, rows)
        with together():
            if folder is not None:
                folder.finish()
            stack.close()


def _chunks(gatherer: Gatherer) -> Iterator[tuple[str, int, int]]:
    """(Megatron key, first row, end) of everything, in an order and in pieces that all ranks agree on."""
    for key, entry in gatherer.table.entries.items():
        step, rows = gatherer.chunk_rows(key), num_rows(entry.shape)
        for start in range(0, rows, step):
            yield key, start, min(start + step, rows)


class _Folder:
    """The folder that rank 0 writes, whole when `stack` is closed after `finish`."""

    def __init__(
        self,
        stack: ExitStack,
        gatherer: Gatherer,
        origin: Origin,
        target: Path,
        max_shard_size: int,
        overwrite: bool,
    ) -> None:
        self._table = table = origin.table
        self._beside, order, self._assets_folder, metadata = _source(stack, origin)
        whole = origin.megatron is not None
        from_hf = None if whole else self._beside
        self._assets = listed_assets(self._assets_folder) if from_hf is None else from_hf.assets
        self._config = None if from_hf is None else from_hf.config
        dtypes = {owners[0].dtype for owners in gatherer.owners.values()}
        # A model of one dtype makes a folder of one dtype, as `import --dtype` does.
        self._dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        specs: list[TensorSpec] = []
        self._carried: list[CopyTensor] = []
        for name, shape in order:
            if name in table.by_hf_name or name in table.copies:
                entry = table.by_hf_name[name][0] if name in table.by_hf_name else table.copies[name]
                specs.append(TensorSpec(name, DTYPE_NAMES[gatherer.owners[entry.key][0].dtype], shape))
            elif self._beside is not None:
                stored = self._beside.tensors[name].dtype
                dtype = DTYPE_NAMES[self._dtype] if self._dtype is not None and stored in FLOATS else stored
                self._carried.append(CopyTensor(name, dtype, shape, (Piece(0, name, 0, num_rows(shape)),)))
                specs.append(self._carried[-1].spec)
        stage = stack.enter_context(
            staged(
                target,
                plan=f"live {uuid.uuid4()}",
                sources=[self._assets_folder / asset for asset in self._assets],
                needed_bytes=sum(spec.nbytes for spec in specs),
                overwrite=overwrite,
            )
        )
        self._path = stage.folder
        self._writer = stack.enter_context(HfWriter(stage.folder, specs, max_shard_size, metadata))
        self._copies = {entry.key: name for name, entry in table.copies.items() if name in self._writer.specs}

    def write(self, key: str, start: int, rows: Tensor) -> None:
        """Rows of a Megatron tensor, from `start` on."""
        entry = self._table.entries[key]
        for source, row, part in by_source(entry, start, rows):
            self._writer.write_rows(entry.sources[source].name, row, _bytes(part))
        if key in self._copies:
            self._writer.write_rows(self._copies[key], start, _bytes(rows))

    def finish(self) -> None:
        """Write what no rank holds: carried tensors, the index, assets, the config."""
        if self._beside is not None:
            reader = PlannedReader(self._carried, self._beside)
            for spec in (tensor.spec for tensor in self._carried):
                step = max(1, CHUNK_BYTES // max(1, row_bytes(spec)))
                for start in range(0, num_rows(spec.shape), step):
                    stop = min(start + step, num_rows(spec.shape))
                    buffer = np.empty((stop - start) * row_bytes(spec), dtype=np.uint8)
                    reader.read_rows(spec.name, start, stop, buffer)
                    self._writer.write_rows(spec.name, start, buffer)
        self._writer.finish()
        copy_assets(self._assets_folder, self._assets, self._path, self._config)
        if self._dtype is not None:
            _fix_config(self._path / "config.json", str(self._dtype).removeprefix("torch."))


def _source(
    stack: ExitStack, origin: Origin
) -> tuple[HfFolder | None, list[tuple[str, tuple[int, ...]]], Path, dict[str, str]]:
    """Where carried tensors are read, all HF tensors in order, the folder of assets, the files' own metadata."""
    if origin.hf_dir is not None:
        folder = stack.enter_context(open_hf_folder(origin.hf_dir))
        return folder, [(n, t.shape) for n, t in folder.tensors.items()], origin.hf_dir, dict(folder.file_metadata)
    assert origin.megatron is not None
    manifest, carried = origin.megatron.manifest, origin.megatron.carried
    reader = None if carried is None else stack.enter_context(HfFolder(carried))
    return reader, [(t.name, t.shape) for t in manifest.tensors], origin.megatron.hf, dict(manifest.file_metadata)


def _bytes(rows: Tensor) -> np.ndarray:
    return rows.contiguous().view(-1).view(torch.uint8).numpy()


def _fix_config(path: Path, dtype: str) -> None:
    """A model of one dtype says so in its config, when that says another."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype", config.get("torch_dtype", dtype)) != dtype:
        write_text(path, json.dumps(with_dtype(config, dtype), indent=2) + "\n")
