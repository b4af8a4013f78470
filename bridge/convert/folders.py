"""Import and export of whole folders: streamed, resumable, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.convert.atomic import Journal, Notify, staged
from bridge.convert.manifest import (
    CARRIED_FOLDER,
    HF_FOLDER,
    MANIFEST_FILE,
    RELEASE_FOLDER,
    TRACKER_FILE,
    Manifest,
    MegatronFolder,
    is_megatron_folder,
)
from bridge.convert.pieces import CopyTensor, Piece, plan_digest
from bridge.convert.plan import ImportPlan, plan_beside, plan_import
from bridge.convert.quantized_folder import DequantizedFolder, open_hf_folder
from bridge.convert.stream import CHUNK_BYTES, CopyResult, Progress, compare, copy
from bridge.errors import CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.hf.folder import HfFolder
from bridge.hf.json_file import read_object
from bridge.hf.tensors import num_rows, printable
from bridge.hf.writer import HfWriter, write_text
from bridge.mapping import Table, table_for
from bridge.torch_dist.writer import DistWriter

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPES = {"keep": None, "bfloat16": "BF16", "float32": "F32"}
_FLOATS = ("BF16", "F16", "F32", "F64")
# What PEFT calls the config of an adapter.
PEFT_CONFIG = "adapter_config.json"
# Assets that speak of images, video and audio only: a text-only import leaves them behind.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Conversion:
    """What an import or export did. `bytes_total` is tensor data; `tensors` counts what was written to the target."""

    target: Path
    tensors: int
    bytes_total: int
    bytes_resumed: int


@dataclass(frozen=True)
class SourceFolder:
    """An HF folder as it is going to be imported: geometry and tables, and the config that goes beside the weights.

    `notices`: what of the folder is not followed or left behind, a line each.
    """

    folder: HfFolder
    geometry: Geometry
    table: Table
    prefix: str
    config: dict[str, Any] | None
    text_only: bool
    notices: tuple[str, ...]


def open_source(stack: ExitStack, path: str | Path, text_only: bool = False, dtype: str = "keep") -> SourceFolder:
    """Open an HF folder and decide what it is. Raises GeometryError, CheckpointError, UsageError."""
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    if is_megatron_folder(path):
        raise UsageError(f"{path}: is a Megatron checkpoint already; `export` turns it into a Hugging Face folder")
    if os.path.lexists(Path(path) / PEFT_CONFIG):
        if not (Path(path) / "config.json").exists():
            raise UsageError(f"{path}: is an adapter, not a model; `adapter import` reads it")
        raise UsageError(
            f"{path}: a model with an adapter beside it ({PEFT_CONFIG}), which transformers loads as one; move the "
            f"adapter's files into a folder of their own: `adapter merge FOLDER OUT --base {path}` makes one model of "
            "the two, and without them this is the base alone"
        )
    check_format(Path(path))
    geometry = Geometry.from_folder(path)
    folder = stack.enter_context(open_hf_folder(path, _DTYPES[dtype]))
    check_listed(folder.path, folder.assets)
    geometry = geometry.named_as_in(folder.tensors)
    notices = [f"{path}: config.json: {notice}" for notice in geometry.notices]
    if isinstance(folder, DequantizedFolder):
        notices += [
            f"{path}: quantized weights, read as the plain ones that they stand for ({line})" for line in folder.storage
        ]
        notices += folder.notices
    if folder.ignored:
        notices.append(f"{path}: left behind, no part of the model: {', '.join(map(printable, folder.ignored))}")
    _check_dtypes(folder, table_for(geometry))
    prefix, config = geometry.prefix, folder.config
    text_only = text_only and geometry.multimodal
    if text_only or dtype != "keep":
        config = read_object(Path(path) / "config.json") if config is None else config
        if text_only:
            config = _text_config(config, geometry)
            geometry = Geometry.from_dict(config)
        config = with_dtype(config, dtype)
    if geometry.tied and _differs_from_embedding(folder, prefix + "embed_tokens.weight"):
        # transformers loads such a folder untied, whatever its config says.
        geometry = replace(geometry, tied=False)
    return SourceFolder(folder, geometry, table_for(geometry), prefix, config, text_only, tuple(notices))


def _check_dtypes(folder: HfFolder, table: Table) -> None:
    for name, tensor in folder.tensors.items():
        if table.is_integer(name):
            if tensor.dtype != "I64":
                raise CheckpointError(f"{folder.path}: tensor {printable(name)} is {tensor.dtype}, expected I64")
        elif tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{folder.path}: tensor {printable(name)} is {tensor.dtype}: quantized, or no weight of a Gemma 4"
            )


def check_format(folder: Path) -> None:
    """Raise CheckpointError for a folder of GGUF files, which hold no weights that this program reads."""
    found = sorted(path.name for path in folder.glob("*.gguf")) if folder.is_dir() else []
    if found and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: holds {printable(found[0])}, which is GGUF and not read; take the safetensors that it came "
            "from (of google's QAT models those named qat-q4_0-unquantized)"
        )


def _differs_from_embedding(folder: HfFolder, embedding: str) -> bool:
    head = folder.tensors.get("lm_head.weight")
    if head is None or embedding not in folder.tensors:
        return False
    expected = CopyTensor("lm_head.weight", head.dtype, head.shape, (Piece(0, embedding, 0, num_rows(head.shape)),))
    same_form = (head.dtype, head.shape) == (folder.tensors[embedding].dtype, folder.tensors[embedding].shape)
    return not same_form or not all(equal for _, equal, _ in compare([expected], folder, folder))


def _text_config(whole: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
    """The config of the text model inside a multimodal one, as transformers' text class reads it."""
    text = dict(whole.get("text_config") or {})
    text["model_type"] = f"{geometry.model_type}_text"
    text["architectures"] = [geometry.text_architecture]
    # The multimodal classes obey the top-level value, the text classes their own.
    text["tie_word_embeddings"] = geometry.tied
    for key in ("dtype", "torch_dtype", "transformers_version", "quantization_config"):
        if key in whole:
            text[key] = whole[key]
    return text


def with_dtype(config: Any, dtype: str) -> Any:
    """A config that says `dtype` (a torch name, or keep) wherever it says one."""
    if dtype == "keep" or not isinstance(config, dict):
        return config
    names = ("dtype", "torch_dtype")
    return {k: dtype if k in names and isinstance(v, str) else with_dtype(v, dtype) for k, v in config.items()}


def _import_plan(source: SourceFolder, dtype: str) -> ImportPlan:
    folder = source.folder
    return plan_import(source.table, folder.tensors, source.prefix, _DTYPES[dtype], folder.file_metadata, folder.path)


def import_hf(
    hf_dir: str | Path,
    megatron_dir: str | Path,
    *,
    dtype: str = "keep",
    text_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify | None = None,
    workers: int = 2,
) -> Conversion:
    """HF folder -> Megatron distributed checkpoint, with everything in it that export needs.

    `dtype` is keep, bfloat16 or float32. Raises a BridgeError; the target is then as it was before.
    """
    with ExitStack() as stack:
        source = open_source(stack, hf_dir, text_only, dtype)
        plan = _import_plan(source, dtype)
        beside = _beside(source, plan)
        if notify is not None:
            for notice in source.notices:
                notify(notice)
        stage = stack.enter_context(
            staged(
                megatron_dir,
                plan=plan_digest([*plan.tensors, *plan.carried], "import", CHUNK_BYTES),
                sources=beside.sources,
                source_folder=source.folder.path,
                needed_bytes=sum(tensor.spec.nbytes for tensor in [*plan.tensors, *plan.carried]),
                overwrite=overwrite,
                notify=notify,
            )
        )
        release, hf = stage.folder / RELEASE_FOLDER, stage.folder / HF_FOLDER
        release.mkdir(exist_ok=True)
        hf.mkdir(exist_ok=True)
        writer = stack.enter_context(DistWriter(release, [tensor.spec for tensor in plan.tensors]))
        result = copy(plan.tensors, source.folder, writer, journal=stage.journal, progress=progress, workers=workers)
        writer.finish({"iteration": 0, "checkpoint_version": 3.0})
        carried = beside.write(stack, hf, stage.journal, workers)
        total, resumed = result.bytes_total + carried.bytes_total, result.bytes_resumed + carried.bytes_resumed
        write_text(stage.folder / TRACKER_FILE, RELEASE_FOLDER)
        return Conversion(Path(megatron_dir), len(plan.tensors), total, resumed)


@dataclass(frozen=True)
class _Beside:
    """What goes beside the weights.

    `reader`: of the carried tensors. `assets`: of `folder`, relative to it. `config`: where it is not as there.
    """

    plan: ImportPlan
    reader: HfFolder | None
    folder: Path
    assets: list[Path]
    config: dict[str, Any] | None

    @property
    def sources(self) -> list[Path]:
        """The files that are read."""
        return [
            *(self.reader.files if self.reader is not None else ()),
            *(self.folder / asset for asset in self.assets),
        ]

    def write(self, stack: ExitStack, hf: Path, journal: Journal, workers: int) -> CopyResult:
        """Everything that export needs besides the weights, into the folder `hf`; what carried tensors took."""
        result = CopyResult(0, 0, 0)
        if self.plan.carried:
            assert self.reader is not None
            (hf / CARRIED_FOLDER).mkdir(exist_ok=True)
            # One file: a journal knows files by their names.
            writer = stack.enter_context(
                HfWriter(hf / CARRIED_FOLDER, [t.spec for t in self.plan.carried], max_shard_size=1 << 62)
            )
            result = copy(self.plan.carried, self.reader, writer, journal=journal, workers=workers)
            writer.finish()
        copy_assets(self.folder, self.assets, hf, self.config)
        self.plan.manifest.write(hf)
        return result


def _beside(source: SourceFolder, plan: ImportPlan) -> _Beside:
    return _Beside(plan, source.folder, source.folder.path, _assets(source), source.config)


def write_beside(origin: str | Path | MegatronFolder, run: str | Path, *, dtype: str) -> None:
    """What `import` writes besides the weights, as `hf/` of the folder `run`, which a trainer fills with checkpoints.

    `origin`: the HF folder, or the imported checkpoint, that it begins from. `dtype` as of `import_hf`: export will
    write the weights in it. Complete or absent; one that is there stays if it is in this dtype, else it is replaced.
    """
    target = Path(run) / HF_FOLDER
    if (target / MANIFEST_FILE).is_file():
        there = Manifest.read(target)
        if plan_beside(there, {}, _DTYPES[dtype]).manifest == there:
            return
    with ExitStack() as stack:
        if isinstance(origin, MegatronFolder):
            carried = None if origin.carried is None else stack.enter_context(HfFolder(origin.carried))
            plan = plan_beside(origin.manifest, {} if carried is None else carried.tensors, _DTYPES[dtype])
            stored = read_object(origin.hf / "config.json")
            config = with_dtype(stored, dtype)
            changed = None if config == stored else config
            beside = _Beside(plan, carried, origin.hf, listed_assets(origin.hf), changed)
        else:
            source = open_source(stack, origin, dtype=dtype)
            beside = _beside(source, _import_plan(source, dtype))
        stage = stack.enter_context(
            staged(
                target,
                plan=plan_digest(beside.plan.carried, "beside", CHUNK_BYTES),
                sources=beside.sources,
                source_folder=beside.folder,
                needed_bytes=sum(tensor.spec.nbytes for tensor in beside.plan.carried),
                overwrite=True,
            )
        )
        beside.write(stack, stage.folder, stage.journal, workers=2)


def _assets(source: SourceFolder) -> list[Path]:
    if not source.text_only:
        return list(source.folder.assets)
    return [asset for asset in source.folder.assets if str(asset) not in _PROCESSOR_FILES]


def listed_assets(hf: Path) -> list[Path]:
    """The assets in the `hf/` folder of a checkpoint: all but the manifest and the carried tensors."""
    found = [path.relative_to(hf) for path in sorted(hf.rglob("*")) if path.is_file() and not path.is_symlink()]
    # Earlier imports kept the config of an adapter, and none of its weights: a folder that no program loads.
    ours = (MANIFEST_FILE, PEFT_CONFIG)
    assets = [path for path in found if str(path) not in ours and path.parts[0] != CARRIED_FOLDER]
    check_listed(hf, assets)
    return assets


def check_listed(folder: Path, assets: list[Path]) -> None:
    """Raise CheckpointError where the config, which was read before the files were listed, is not among them."""
    if Path("config.json") not in assets:
        raise CheckpointError(f"{printable(folder / 'config.json')}: vanished while the folder was being read")


def copy_assets(source: Path, assets: list[Path], target: Path, config: Mapping[str, Any] | None = None) -> None:
    """Copy files, given relative to `source`; `config` is what config.json is to say where it is not as it was."""
    for asset in assets:
        destination = target / asset
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / asset, destination)
    if config is not None:
        write_config(target, config)


def write_config(target: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def compare_assets(ours: Path, theirs: Path, assets: list[Path], config: Mapping[str, Any] | None = None) -> list[str]:
    """Assets of `theirs` that `ours` lacks or has with other bytes; `config` as of `copy_assets`."""

    def equal(asset: Path) -> bool:
        if config is not None and str(asset) == "config.json":
            return read_object(ours / asset) == config
        return (ours / asset).read_bytes() == (theirs / asset).read_bytes()

    return [str(asset) for asset in assets if not (ours / asset).is_file() or not equal(asset)]
