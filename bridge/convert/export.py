"""Export of a whole Megatron checkpoint to an HF folder: streamed, resumable, complete or absent."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.convert.atomic import Notify, staged
from bridge.convert.folders import (
    DEFAULT_SHARD_BYTES,
    PEFT_CONFIG,
    Conversion,
    copy_assets,
    listed_assets,
    write_config,
)
from bridge.convert.manifest import ADAPTER_FILE, MANIFEST_FILE, MegatronFolder
from bridge.convert.multimodal import open_whole
from bridge.convert.pieces import CopyTensor, PlannedReader, plan_digest, same_tensors
from bridge.convert.plan import JoinedReader, narrowed, plan_export
from bridge.convert.quantized_export import QuantizedReader, open_origin
from bridge.convert.stream import CHUNK_BYTES, Progress, copy
from bridge.errors import CheckpointError, UsageError
from bridge.hf.folder import HfFolder
from bridge.hf.json_file import read_object
from bridge.hf.tensors import RowReader
from bridge.hf.writer import HfWriter
from bridge.mapping import table_for
from bridge.torch_dist.reader import DistReader


@dataclass(frozen=True)
class _ExportInputs:
    """What an export reads and writes.

    `tensors`: of `reader`, whose files are `files`. `assets`: by their folder. `config`: where it is not as there.
    """

    reader: RowReader
    tensors: tuple[CopyTensor, ...]
    files: list[Path]
    assets: dict[Path, list[Path]]
    config: dict[str, Any] | None


def export_hf(
    megatron_dir: str | Path,
    hf_dir: str | Path,
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    check_files: bool = False,
    multimodal: str | Path | None = None,
    quantize: str | None = None,
    unchanged_from: str | Path | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
    workers: int = 2,
) -> Conversion:
    """Megatron checkpoint -> HF folder: the same tensors, config and assets that were imported.

    `multimodal`: a folder whose language model a text model replaces (`bridge.convert.multimodal`). `quantize`: one of
    `PRESETS`, for a folder of quantized weights (`bridge.convert.quantized_export`), and `unchanged_from`: a quantized
    folder, whose bytes linears keep that still have its weights. `check_files` first compares every stored item with
    its checksum. Raises a BridgeError; the target is then as it was before.
    """
    if unchanged_from is not None and quantize is None:
        raise UsageError("--unchanged-from says which bytes a quantized folder keeps: add --quantize")
    with ExitStack() as stack:
        checkpoint = MegatronFolder.open(megatron_dir)
        source = _open(stack, checkpoint, multimodal, check_files, quantize, unchanged_from, notify, workers)
        tensors = source.tensors
        options = ("export", quantize or "", str(unchanged_from or ""), str(multimodal or ""), max_shard_size)
        stage = stack.enter_context(
            staged(
                hf_dir,
                plan=plan_digest(tensors, *options, CHUNK_BYTES),
                sources=[*source.files, *(home / asset for home, found in source.assets.items() for asset in found)],
                source_folder=checkpoint.path,
                needed_bytes=sum(tensor.spec.nbytes for tensor in tensors),
                overwrite=overwrite,
                notify=notify,
            )
        )
        writer = stack.enter_context(
            HfWriter(
                stage.folder,
                [tensor.spec for tensor in tensors],
                max_shard_size,
                checkpoint.manifest.file_metadata or None,
            )
        )
        result = copy(tensors, source.reader, writer, journal=stage.journal, progress=progress, workers=workers)
        writer.finish()
        for home, assets in source.assets.items():
            copy_assets(home, assets, stage.folder)
        if source.config is not None:
            write_config(stage.folder, source.config)
        return Conversion(Path(hf_dir), len(tensors), result.bytes_total, result.bytes_resumed)


def _open(
    stack: ExitStack,
    checkpoint: MegatronFolder,
    multimodal: str | Path | None,
    check_files: bool,
    quantize: str | None,
    unchanged_from: str | Path | None,
    notify: Notify | None,
    workers: int,
) -> _ExportInputs:
    reader: RowReader
    reader, tensors, files = open_checkpoint(stack, checkpoint, check_files, notify)
    assets = {checkpoint.hf: listed_assets(checkpoint.hf)}
    home, table, config = checkpoint.hf, table_for(checkpoint.geometry), None
    if notify is not None and (checkpoint.hf / PEFT_CONFIG).exists():
        notify(f"{checkpoint.hf}: {PEFT_CONFIG} is left behind: an earlier version imported it without its weights")
    if multimodal is not None:
        whole = open_whole(stack, multimodal, checkpoint.geometry, tensors, reader, notify)
        reader, tensors, table, home, config = whole.reader, whole.tensors, whole.table, whole.folder, whole.config
        files += whole.files
        # What the checkpoint has beside its weights it has from there, or it was changed since.
        ours = [asset for asset in assets[checkpoint.hf] if str(asset) != "config.json"]
        assets = {whole.folder: [asset for asset in whole.assets if asset not in ours], checkpoint.hf: ours}
    if quantize is not None:
        origin = open_origin(stack, unchanged_from)
        files += origin.files if origin is not None else []
        quantized = QuantizedReader(PlannedReader(tensors, reader), table, quantize, origin, workers)
        reader, tensors = quantized, tuple(same_tensors(quantized))
        config = quantized.config(config or read_object(home / "config.json"), notify)
    return _ExportInputs(reader, tensors, files, assets, config)


def open_checkpoint(
    stack: ExitStack, checkpoint: MegatronFolder, check_files: bool = False, notify: Notify | None = None
) -> tuple[JoinedReader, tuple[CopyTensor, ...], list[Path]]:
    """What export reads and writes: a reader, the plan, and the files that are read. Raises a BridgeError."""
    if (checkpoint.path / ADAPTER_FILE).is_file():
        raise UsageError(
            f"{checkpoint.path}: holds adapters: `adapter merge` makes a model of them, `adapter export` a PEFT folder"
        )
    dist = stack.enter_context(DistReader(checkpoint.weights))
    table = table_for(checkpoint.geometry)
    table.check_keys({key: tensor.shape for key, tensor in dist.tensors.items()}, checkpoint.weights)
    files = sorted({chunk.file for tensor in dist.tensors.values() for chunk in tensor.chunks})
    readers: list[Any] = [dist]
    if checkpoint.carried is not None:
        carried = stack.enter_context(HfFolder(checkpoint.carried))
        readers.append(carried)
        files += carried.files
    if check_files:
        for key, chunk, intact in dist.check_items():
            if not intact:
                raise CheckpointError(f"{chunk.file}: {key} is damaged (its checksum differs)")
        if notify is not None:
            notify("every stored item agrees with its checksum")
    plan = plan_export(table, checkpoint.manifest)
    if notify is not None:
        for (have, written), count in narrowed(table, checkpoint.manifest, dist.tensors).items():
            notify(
                f"{checkpoint.weights}: {count} tensors are {have} and are written as {written}, which is what "
                f"{checkpoint.hf / MANIFEST_FILE} says; where that is a run of an earlier version, its `train` command "
                "once more makes it the dtype of the run"
            )
    return JoinedReader(readers), plan, files
