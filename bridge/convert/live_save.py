"""A live, sharded model as a complete HF folder, written by rank 0 in bounded chunks."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridge.convert.atomic import staged
from bridge.convert.folders import copy_assets, listed_assets, with_dtype
from bridge.convert.live import CHUNK_BYTES, Gatherer
from bridge.convert.torch_dtypes import DTYPE_NAMES
from bridge.errors import BridgeError, CheckpointError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import RowReader, TensorSpec, num_rows, row_bytes
from bridge.hf.writer import HfWriter, write_text
from bridge.mapping import Entry

if TYPE_CHECKING:
    from bridge.api import Gemma4Bridge

import numpy as np


def save_live(
    model: Sequence[torch.nn.Module], bridge: Gemma4Bridge, target: Path, max_shard_size: int, overwrite: bool
) -> None:
    """Every rank takes part. What fails on rank 0 is raised on every rank, after the others have sent their part."""
    gatherer = Gatherer(model, bridge.table)
    distributed = torch.distributed.is_initialized()
    failure: list[str | None] = [None]
    if distributed and torch.distributed.get_rank() != 0:
        for key, start, stop in _chunks(gatherer):
            gatherer.rows(key, start, stop, dst=0)
    else:
        received = _chunks(gatherer)
        try:
            _write(gatherer, received, bridge, target, max_shard_size, overwrite)
        except BridgeError as error:
            failure[0] = str(error)
            for key, start, stop in received:
                gatherer.rows(key, start, stop, dst=0)
    if distributed:
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def _chunks(gatherer: Gatherer) -> Iterator[tuple[str, int, int]]:
    """(Megatron key, first row, end) of everything, in an order and in pieces that all ranks agree on."""
    for key, entry in gatherer.table.entries.items():
        size = math.prod(entry.shape[1:]) * gatherer.owners[key][0].dtype.itemsize
        step, rows = max(1, CHUNK_BYTES // max(1, size)), num_rows(entry.shape)
        for start in range(0, rows, step):
            yield key, start, min(start + step, rows)


def _write(
    gatherer: Gatherer,
    received: Iterator[tuple[str, int, int]],
    bridge: Gemma4Bridge,
    target: Path,
    max_shard_size: int,
    overwrite: bool,
) -> None:
    table = bridge.table
    with ExitStack() as stack:
        beside, order, assets_folder, metadata = _source(stack, bridge)
        assets = listed_assets(assets_folder) if bridge.megatron is not None else HfFolder(assets_folder).assets
        specs, rest = [], []
        for name, shape in order:
            if name in table.by_hf_name or name in table.copies:
                entry = table.by_hf_name[name][0] if name in table.by_hf_name else table.copies[name]
                specs.append(TensorSpec(name, DTYPE_NAMES[gatherer.owners[entry.key][0].dtype], shape))
            elif beside is not None:
                specs.append(TensorSpec(name, beside.tensors[name].dtype, shape))
                rest.append(specs[-1])
        stage = stack.enter_context(
            staged(
                target,
                plan=f"live {uuid.uuid4()}",
                sources=[assets_folder / asset for asset in assets],
                needed_bytes=sum(spec.nbytes for spec in specs),
                overwrite=overwrite,
            )
        )
        writer = stack.enter_context(HfWriter(stage.folder, specs, max_shard_size, metadata))
        copies = {entry.key: name for name, entry in table.copies.items() if name in writer.specs}
        for key, start, stop in received:
            rows = gatherer.rows(key, start, stop, dst=0)
            assert rows is not None
            _write_rows(writer, table.entries[key], start, rows)
            if key in copies:
                writer.write_rows(copies[key], start, _bytes(rows))
        for spec in rest:
            assert beside is not None
            step = max(1, CHUNK_BYTES // max(1, row_bytes(spec)))
            for start in range(0, num_rows(spec.shape), step):
                stop = min(start + step, num_rows(spec.shape))
                buffer = np.empty((stop - start) * row_bytes(spec), dtype=np.uint8)
                beside.read_rows(spec.name, start, stop, buffer)
                writer.write_rows(spec.name, start, buffer)
        writer.finish()
        copy_assets(assets_folder, assets, stage.folder)
        _fix_config(stage.folder / "config.json", gatherer)


def _source(
    stack: ExitStack, bridge: Gemma4Bridge
) -> tuple[RowReader | None, list[tuple[str, tuple[int, ...]]], Path, dict[str, str]]:
    """Where carried tensors are read, all HF tensors in order, the folder of assets, the files' own metadata."""
    if bridge.hf_dir is not None:
        folder = stack.enter_context(HfFolder(bridge.hf_dir))
        return folder, [(n, t.shape) for n, t in folder.tensors.items()], bridge.hf_dir, dict(folder.file_metadata)
    assert bridge.megatron is not None
    manifest, carried = bridge.megatron.manifest, bridge.megatron.carried
    reader = None if carried is None else stack.enter_context(HfFolder(carried))
    return reader, [(t.name, t.shape) for t in manifest.tensors], bridge.megatron.hf, dict(manifest.file_metadata)


def _write_rows(writer: HfWriter, entry: Entry, first: int, rows: Tensor) -> None:
    """Rows [first, first + n) of a Megatron tensor, to wherever in the HF tensors they belong."""
    for block in entry.blocks:
        low, high = max(first, block.row), min(first + rows.shape[0], block.row + block.num_rows)
        if low < high:
            name = entry.sources[block.source].name
            writer.write_rows(name, block.source_row + low - block.row, _bytes(rows[low - first : high - first]))


def _bytes(rows: Tensor) -> np.ndarray:
    return rows.contiguous().view(-1).view(torch.uint8).numpy()


def _fix_config(path: Path, gatherer: Gatherer) -> None:
    """A model of one dtype says so in its config, when that says another."""
    dtypes = {owners[0].dtype for owners in gatherer.owners.values()}
    config = json.loads(path.read_text(encoding="utf-8"))
    if len(dtypes) == 1:
        dtype = str(next(iter(dtypes))).removeprefix("torch.")
        if config.get("dtype", config.get("torch_dtype", dtype)) != dtype:
            write_text(path, json.dumps(with_dtype(config, dtype), indent=2) + "\n")
