"""Opening adapters and their bases: whatever the folder is, an `Adapter` or a `Base` comes out."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from bridge.convert.atomic import Notify
from bridge.convert.folders import Conversion, listed_assets
from bridge.convert.manifest import ADAPTER_FILE, MegatronFolder, is_megatron_folder
from bridge.convert.stream import Progress
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from bridge.hf.tensors import ITEM_SIZES
from bridge.lora.adapter import Adapter, adapter_assets
from bridge.lora.checkpoint import AdapterFolder, write_adapter
from bridge.lora.merge import Base, check_copies, open_base, say_notes
from bridge.lora.peft_config import CONFIG_FILE, PeftConfig, other_adapters
from bridge.lora.peft_folder import open_peft
from bridge.lora.spec import Factor, Target
from bridge.lora.table import part_name
from bridge.mapping import Table, table_for
from bridge.torch_dist.reader import DistReader


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter as PEFT writes it, and no Megatron one."""
    return (Path(path) / CONFIG_FILE).exists() and not is_megatron_folder(path)


def open_megatron(stack: ExitStack, path: str | Path) -> Adapter:
    """Open a Megatron adapter: of `adapter import`, or the output of a run, whose latest complete checkpoint it is.

    Raises CheckpointError that names what is missing or damaged.
    """
    if is_peft_folder(path):
        raise UsageError(f"{path}: is a PEFT folder already; `adapter convert` writes it in another format")
    folder = _megatron(path)
    reader = stack.enter_context(DistReader(folder.checkpoint.weights))

    def dtype(target: Target, part: Factor) -> str:
        entry, _ = folder.table.by_hf_name[part_name(target.name, part)]
        return reader.tensors[entry.key].dtype

    chunks = {chunk.file for tensor in reader.tensors.values() for chunk in tensor.chunks}
    files = (folder.checkpoint.path / ADAPTER_FILE, *sorted(chunks))
    table = table_for(folder.checkpoint.geometry)
    base = folder.manifest.hf or folder.manifest.megatron
    targets = tuple(folder.table.targets)
    spec, where = folder.manifest.spec, folder.checkpoint.path
    hf = folder.checkpoint.hf
    assets = adapter_assets(listed_assets(hf))
    return Adapter(where, table, spec, targets, folder.values(), dtype, files, base, assets_folder=hf, assets=assets)


def open_with_table(stack: ExitStack, path: Path, base: str | None) -> Adapter:
    """Open a PEFT folder for the model at `base` (default: where its config says it is). Reads no weights of it."""
    return open_peft(stack, path, table_of(base_of(path, base), revision_of(path, base)))


def base_of(path: Path, base: str | None) -> str:
    """Where the base of an adapter is: as given, or as the adapter says. Raises UsageError where neither says it."""
    if base is None:
        if is_peft_folder(path):
            base = PeftConfig.read(path).base
        else:
            manifest = _megatron(path).manifest
            base = manifest.hf or manifest.megatron
    if base is None:
        raise UsageError(f"{path}: does not say which model it adapts; pass --base")
    return base


def revision_of(path: Path, base: str | None) -> str | None:
    """The revision of its base on the hub that an adapter names; of another `base` there is none to know."""
    return PeftConfig.read(path).revision if base is None and is_peft_folder(path) else None


def _megatron(path: str | Path) -> AdapterFolder:
    """A Megatron adapter. Raises CheckpointError; of a folder of folders with adapters it names those."""
    others = "" if is_megatron_folder(path) else other_adapters(Path(path))
    if others:
        raise CheckpointError(f"{path}: holds no adapter itself{others}")
    return AdapterFolder.open(path)


def table_of(name: str, revision: str | None = None) -> Table:
    """The mapping table of a model, from its config alone."""
    path = resolve(name, config_only=True, revision=revision)
    geometry = MegatronFolder.open(path).geometry if is_megatron_folder(path) else Geometry.from_folder(path)
    return table_for(geometry)


def open_both(stack: ExitStack, path: Path, base: str | None) -> tuple[Base, Adapter]:
    """An adapter, PEFT's or Megatron's, and the model that it adapts."""
    opened = open_base(stack, resolve(base_of(path, base), revision=revision_of(path, base)))
    adapter = open_peft(stack, path, opened.table) if is_peft_folder(path) else open_megatron(stack, path)
    return opened, adapter


def import_peft(
    path: Path,
    target: Path,
    base: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Conversion:
    """A PEFT folder, in any format, as a Megatron adapter of the Megatron checkpoint `base`. Raises a BridgeError."""
    with ExitStack() as stack:
        model = MegatronFolder.open(base)
        adapter = open_peft(stack, path, table_for(model.geometry))
        adapter.common_dtype()
        if adapter.copies:
            check_copies(adapter, open_base(stack, base).reader)
        say_notes(adapter, model.hf, notify)
        total = sum(_nbytes(adapter, target, part) for target in adapter.targets for part in target.parts)
        done = 0

        def value(target: Target, part: Factor) -> Tensor:
            nonlocal done
            done += _nbytes(adapter, target, part)
            if progress is not None:
                progress(done, total, target.name)
            return adapter.value(target, part)

        table = write_adapter(
            target,
            base,
            adapter.spec,
            value,
            lambda target, part: TORCH_DTYPES[adapter.dtype(target, part)],
            sources=list(adapter.files),
            overwrite=overwrite,
        )
        return Conversion(target, len(table.entries), total, 0)


def _nbytes(adapter: Adapter, target: Target, part: Factor) -> int:
    return ITEM_SIZES[adapter.dtype(target, part)] * math.prod(target.shape_of(part))
