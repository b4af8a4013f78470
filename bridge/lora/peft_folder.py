"""Adapters as folders that PEFT, vLLM or SGLang read: `adapter_config.json` and `adapter_model.safetensors`.

Only LoRA, and only the options that a `LoraSpec` has: an adapter that would need more is refused, because it would be
another adapter here. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge.convert.atomic import Notify, staged
from bridge.convert.folders import Conversion, copy_assets
from bridge.convert.pieces import plan_digest
from bridge.convert.stream import Progress
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import BridgeError, CheckpointError
from bridge.hf.folder import INDEX_FILE, HfFolder
from bridge.hf.tensors import TensorSpec, num_rows, printable, row_bytes
from bridge.hf.writer import HfWriter, write_text
from bridge.lora.adapter import Adapter, BaseCopy, adapter_assets
from bridge.lora.formats import StoredTensor, check_servable, note_for_engine, stored_tensors
from bridge.lora.peft_config import CONFIG_FILE, PeftConfig, config_json
from bridge.lora.spec import Factor, Target
from bridge.lora.stored import read_names
from bridge.mapping import Table

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def open_peft(stack: ExitStack, path: str | Path, table: Table) -> Adapter:
    """Open a folder in any format, for the model of `table`.

    Raises CheckpointError: what `PeftConfig.read` and `read_names` raise; a target that matches nothing; a tensor that
    is missing, or of another shape, as in an adapter for another model. Reading a tensor raises it where the copies of
    a format (the A of gate and up; K that serves as V) differ from each other.
    """
    folder = Path(path)
    config = PeftConfig.read(folder)
    source = stack.enter_context(_open_weights(folder))
    file = source.files[0]
    try:
        stored = read_names(config, source, table)
    except CheckpointError:
        raise
    except BridgeError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    keys = stored.keys
    for name, key in stored.copies:
        entry, index = table.by_hf_name[name]
        if source.tensors[key].shape != entry.sources[index].shape:
            raise CheckpointError(
                f"{file}: {printable(key)} has the shape {list(source.tensors[key].shape)}, in the base it has "
                f"{list(entry.sources[index].shape)}: the base was resized for this adapter; do the same to it first"
            )

    def value(target: Target, part: Factor) -> Tensor:
        return _assembled(source, stored.stored_tensors[target.name, part], keys)

    def dtype(target: Target, part: Factor) -> str:
        return source.tensors[keys[stored.stored_tensors[target.name, part][0].key]].dtype

    return Adapter(
        folder,
        table,
        stored.spec,
        stored.targets,
        value,
        dtype,
        (folder / CONFIG_FILE, *source.files),
        config.base,
        config.revision,
        tuple(f"{folder}: {note}" for note in stored.notes),
        folder,
        adapter_assets(source.assets),
        tuple(BaseCopy(name, key, source) for name, key in stored.copies),
    )


def _open_weights(folder: Path) -> HfFolder:
    """The weights: one file, or shards with an index of their own or, as transformers saves them, a model's."""
    index = f"{WEIGHTS_FILE}.index.json"
    single = (folder / WEIGHTS_FILE).exists()
    if not single and not (folder / index).exists():
        if (folder / _PICKLE).exists():
            raise CheckpointError(
                f"{folder}: has only {_PICKLE}, a pickle, which is not read; PEFT converts it: load it with "
                "PeftModel.from_pretrained and save it with save_pretrained"
            )
        index = INDEX_FILE
    return HfFolder(folder, single=WEIGHTS_FILE, index=index)


def _assembled(source: HfFolder, parts: Sequence[StoredTensor], keys: Mapping[str, str]) -> Tensor:
    """The canonical tensor whose pieces are stored; zero where there is none."""
    target, part = parts[0].target, parts[0].part
    whole = torch.zeros(target.shape_of(part), dtype=TORCH_DTYPES[source.tensors[keys[parts[0].key]].dtype])
    for piece in parts:
        name = keys[piece.key]
        info = source.tensors[name]
        buffer = np.empty(num_rows(info.shape) * row_bytes(info), dtype=np.uint8)
        source.read_rows(name, 0, num_rows(info.shape), buffer)
        view = piece.view(whole)
        stored = torch.from_numpy(buffer).view(whole.dtype).view(view.shape)
        if piece.again and not torch.equal(_bits(view), _bits(stored)):
            why = f"together they are no adapter of {target.name}, which serves for both"
            if target.kind == "saved":
                why = (
                    "they were trained apart, and are one weight in this base; untie it first (tie_word_embeddings: "
                    "false in config.json, and an lm_head.weight), or merge with PEFT"
                )
            raise CheckpointError(
                f"{source.files[0]}: {printable(piece.key)} is not the same as {printable(parts[0].key)}: {why}"
            )
        view.copy_(stored)
    return whole


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def write_peft(
    target: str | Path,
    adapter: Adapter,
    *,
    adapter_format: str = "peft",
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Conversion:
    """Write an adapter as a folder in a format; complete or absent.

    Raises UsageError (what a folder or the format cannot hold, an existing target) and CheckpointError.
    """
    if notify is not None:
        for note in adapter.notes:
            notify(note)
    check_servable(adapter_format, adapter.targets)
    left_out = note_for_engine(adapter_format, adapter.targets)
    if notify is not None and left_out is not None:
        notify(left_out)
    planned = list(stored_tensors(adapter_format, adapter.targets, adapter.table))
    dtypes = {(t.name, part): adapter.dtype(t, part) for t in adapter.targets for part in t.parts}
    specs = [TensorSpec(p.key, dtypes[p.target.name, p.part], p.shape) for p in planned]
    total = sum(spec.nbytes for spec in specs)
    home = adapter.assets_folder or adapter.path
    text = json.dumps(config_json(adapter, adapter_format), indent=2, sort_keys=True) + "\n"
    with staged(
        target,
        plan=plan_digest([], "adapter", text),
        sources=[*adapter.files, *(home / asset for asset in adapter.assets)],
        source_folder=adapter.path,
        needed_bytes=total,
        overwrite=overwrite,
        notify=notify,
    ) as stage:
        ordered = sorted(specs, key=lambda spec: spec.name)
        with HfWriter(stage.folder, ordered, max_shard_size=1 << 62, single=WEIGHTS_FILE) as writer:
            done = 0
            for (of, part), group in groupby(planned, key=lambda piece: (piece.target, piece.part)):
                whole = adapter.value(of, part)
                for piece in group:
                    data = _bits(piece.view(whole).reshape(piece.shape))
                    writer.write_rows(piece.key, 0, data.numpy())
                    done += data.numel()
                    if progress is not None:
                        progress(done, total, piece.key)
            writer.finish()
        copy_assets(home, list(adapter.assets), stage.folder)
        write_text(stage.folder / CONFIG_FILE, text)
    return Conversion(Path(target), len(specs), total, 0)
