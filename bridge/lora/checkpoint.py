"""Adapters as Megatron distributed checkpoints: what a LoRA run writes, and `adapter import`.

FOLDER/adapter.json                 the spec, and where the base is
FOLDER/hf/                          of the base, as in every Megatron checkpoint: config, tokenizer, carried tensors
FOLDER/{release,iter_0000010}/      the adapters, under the keys of `lora.table`, and a trainer's optimizer state

Nothing here needs the base's weights, or a process group.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bridge.convert.atomic import staged
from bridge.convert.manifest import ADAPTER_FILE, HF_FOLDER, RELEASE_FOLDER, TRACKER_FILE, MegatronFolder
from bridge.convert.pieces import plan_digest
from bridge.convert.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from bridge.errors import BridgeError, CheckpointError
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import write_text
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.lora.table import Adapted, AdapterTable, Values, adapter_table, part_name, peft_view
from bridge.lora.targets import resolve
from bridge.mapping import table_for
from bridge.torch_dist.reader import DistReader
from bridge.torch_dist.writer import DistWriter

_VERSION = 1


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter is of: its spec, and its base, a Hugging Face folder (or hub id) or a Megatron one."""

    spec: LoraSpec
    hf: str | None = None
    megatron: str | None = None

    def write(self, folder: Path) -> None:
        """Write `adapter.json` into `folder`, by a rename."""
        data = {"version": _VERSION, "spec": self.spec.to_json(), "base": {"hf": self.hf, "megatron": self.megatron}}
        partial = folder / f".{ADAPTER_FILE}.partial"
        write_text(partial, json.dumps(data, indent=1) + "\n")
        partial.rename(folder / ADAPTER_FILE)

    @classmethod
    def read(cls, folder: Path) -> AdapterManifest:
        """Read `adapter.json` of `folder`. Raises CheckpointError."""
        path = folder / ADAPTER_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version, base = data["version"], data["base"]
            if version != _VERSION:
                raise CheckpointError(f"{path}: version {version}, this program reads {_VERSION}")
            for value in (base["hf"], base["megatron"]):
                if value is not None and not isinstance(value, str):
                    raise ValueError(f"base {value!r}")
            return cls(LoraSpec.from_json(data["spec"]), base["hf"], base["megatron"])
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; this is no adapter, or not one that Megatron holds") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not an adapter's manifest ({type(error).__name__}: {error})") from None
        except BridgeError as error:
            raise CheckpointError(f"{path}: {error}") from None


@dataclass(frozen=True)
class AdapterFolder:
    """A Megatron adapter on disk: its latest complete checkpoint, what it adapts, and the table of its tensors."""

    checkpoint: MegatronFolder
    manifest: AdapterManifest
    table: AdapterTable

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """An adapter that `adapter import`, or a LoRA run, wrote. Reads no tensors. Raises CheckpointError."""
        checkpoint = MegatronFolder.open(path)
        manifest = AdapterManifest.read(checkpoint.path)
        base = table_for(checkpoint.geometry)
        return cls(checkpoint, manifest, adapter_table(base, resolve(manifest.spec, base)))

    def tensors(self) -> Iterator[tuple[str, Factor, Tensor]]:
        """(HF name of the weight on disk, part, canonical tensor on the CPU), in the order of the table.

        Shapes are those of `Target.shape_of`, dtypes as stored. Raises MappingError or
        CheckpointError where the folder holds something else than its manifest says.
        """
        value = self.values()
        for target in self.table.targets:
            for part in target.parts:
                yield target.name, part, value(target, part)

    def values(self) -> Values:
        """The same tensors, each read when it is asked for, and nothing else with it."""
        reader = DistReader(self.checkpoint.weights)
        try:
            self.table.check_keys({key: t.shape for key, t in reader.tensors.items()}, self.checkpoint.weights)
        except BaseException:
            reader.close()
            raise

        def value(target: Target, part: Factor) -> Tensor:
            return _canonical(reader, self.table, target, part)

        weakref.finalize(value, reader.close)
        return value


def _canonical(reader: DistReader, table: AdapterTable, target: Target, part: Factor) -> Tensor:
    """The rows of one target in the Megatron tensor that may hold those of others as well."""
    entry, index = table.by_hf_name[part_name(target.name, part)]
    dtype = TORCH_DTYPES[reader.tensors[entry.key].dtype]
    whole = torch.empty(entry.sources[index].shape, dtype=dtype)
    for block in (block for block in entry.blocks if block.source == index):
        rows = whole[block.source_row : block.source_row + block.num_rows]
        reader.read_rows(entry.key, block.row, block.row + block.num_rows, rows.view(torch.uint8).numpy())
    return peft_view(whole, target, part).contiguous()


def write_adapter(
    target: str | Path,
    base: str | Path,
    spec: LoraSpec,
    values: Values,
    dtype: Callable[[Target, Factor], torch.dtype],
    *,
    sources: list[Path] | None = None,
    overwrite: bool = False,
) -> AdapterTable:
    """Write an adapter of the Megatron checkpoint `base` as a Megatron adapter folder; complete or absent.

    `values(target, part)` gives the canonical tensors (as `AdapterFolder.tensors` yields them), which are asked for one
    Megatron tensor after the other, in the order of the table. `sources`: files they are read from, which must not
    change meanwhile. Raises a BridgeError; the target is then as it was before.
    """
    checkpoint = MegatronFolder.open(base)
    model = table_for(checkpoint.geometry)
    table = adapter_table(model, resolve(spec, model))
    dtypes = {key: kind for each in table.adapted.values() for key, kind in _dtypes(table, each, dtype)}
    specs = [TensorSpec(entry.key, DTYPE_NAMES[dtypes[entry.key]], entry.shape) for entry in table.entries.values()]
    plan = plan_digest([], "adapter", json.dumps(spec.to_json(), sort_keys=True), *(s.dtype for s in specs))
    with staged(
        target,
        plan=plan,
        sources=[*(sources or []), *(p for p in sorted(checkpoint.hf.rglob("*")) if p.is_file())],
        source_folder=checkpoint.path,
        needed_bytes=sum(item.nbytes for item in specs),
        overwrite=overwrite,
    ) as stage:
        release = stage.folder / RELEASE_FOLDER
        shutil.rmtree(release, ignore_errors=True)
        release.mkdir()
        with DistWriter(release, specs) as writer:
            for adapted in table.adapted.values():
                for part in adapted.parts:
                    key, whole = _fused(table, adapted, part, values, dtypes)
                    for chunk in writer.chunks(key):
                        rows = whole[chunk.start : chunk.stop].contiguous()
                        writer.write_rows(key, chunk.start, rows.view(torch.uint8).numpy())
            writer.finish({"iteration": 0, "checkpoint_version": 3.0})
        shutil.copytree(checkpoint.hf, stage.folder / HF_FOLDER, dirs_exist_ok=True)
        AdapterManifest(spec, megatron=str(base)).write(stage.folder)
        write_text(stage.folder / TRACKER_FILE, RELEASE_FOLDER)
    return table


def _dtypes(
    table: AdapterTable, adapted: Adapted, dtype: Callable[[Target, Factor], torch.dtype]
) -> Iterator[tuple[str, torch.dtype]]:
    """The keys of a Megatron tensor's adapters, each with the dtype that all its sources have."""
    for part in adapted.parts:
        found = {dtype(target, part): target.name for target in adapted.targets.values()}
        if len(found) > 1:
            raise CheckpointError(f"{', '.join(found.values())}: lie in one tensor here, and have several dtypes")
        entry, _ = table.by_hf_name[part_name(adapted.targets[adapted.order[0]].name, part)]
        yield entry.key, next(iter(found))


def _fused(
    table: AdapterTable, adapted: Adapted, part: Factor, values: Values, dtypes: Mapping[str, torch.dtype]
) -> tuple[str, Tensor]:
    """One Megatron tensor of adapters: its key, and all of it."""
    targets = [adapted.targets[source] for source in adapted.order]
    entry, _ = table.by_hf_name[part_name(targets[0].name, part)]
    whole = torch.zeros(entry.shape, dtype=dtypes[entry.key])
    for index, target in enumerate(targets):
        value = values(target, part)
        shape = target.shape_of(part)
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{part_name(target.name, part)} is {list(value.shape)}, expected {list(shape)}")
        for block in entry.blocks:
            if block.source == index:
                rows = peft_view(whole[block.row : block.row + block.num_rows], target, part)
                first = block.source_row
                rows.copy_(value[first : first + len(rows)])
    return entry.key, whole
