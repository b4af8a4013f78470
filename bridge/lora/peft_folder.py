"""Adapters as folders that PEFT, vLLM or SGLang read: `adapter_config.json` and `adapter_model.safetensors`.

Only LoRA, and only the options that a `LoraSpec` has: an adapter that would need more is refused, because it would be
another adapter here. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.convert.atomic import Notify, staged
from bridge.convert.folders import Conversion, copy_assets
from bridge.convert.pieces import plan_digest
from bridge.convert.stream import Progress
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import BridgeError, CheckpointError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import TensorSpec, num_rows, shown
from bridge.hf.writer import HfWriter, write_text
from bridge.lora.adapter import Adapter, adapter_assets
from bridge.lora.dress import FORMATS, Piece, check_servable, engine_targets, pieces
from bridge.lora.spec import ALL_LINEAR, LoraSpec, Part, Target
from bridge.lora.targets import named_parameters, resolve
from bridge.mapping import Table

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Our own entry in a config: the format, and the spec as it was in a dress that PEFT does not read; in PEFT's own only
# what PEFT has no field for.
_OURS = "gemma4_bridge"
# Fields of a config that say nothing about what the tensors do to a weight.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("ephemeral_gpu_offload", "qalora_group_size", "runtime_config", _OURS),
}
_SPEC_FIELDS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "ensure_weight_tying"),
    *("layers_to_transform", "layers_pattern"),
}
# Initialisations that leave the base as it is. The others (pissa, olora, ...) train beside a changed base.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says: the dress of the tensors, what they adapt, and the model's folder or id.

    `ties`: what was done to an embedding was done to the head that is tied to it.
    """

    dress: str
    spec: LoraSpec
    base: str | None
    ties: bool

    @classmethod
    def read(cls, folder: str | Path) -> PeftConfig:
        """Raises CheckpointError: no such file, no JSON, not LoRA, an option that is not supported."""
        path = Path(folder) / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; a PEFT adapter has one") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({shown(str(error))})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: holds no JSON object")
        try:
            return cls._parse(config)
        except (BridgeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, config: dict[str, Any]) -> PeftConfig:
        if config.get("peft_type") != "LORA":
            raise CheckpointError(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
        for name, value in config.items():
            if name not in _HARMLESS | _SPEC_FIELDS | {"bias", "init_lora_weights"} and value:
                raise CheckpointError(f"{shown(name)} is {shown(json.dumps(value))}, which is not supported")
        if config.get("bias", "none") != "none":
            raise CheckpointError(f"bias is {config['bias']!r}, which is not supported (only 'none')")
        if config.get("init_lora_weights", True) not in _INITS:
            raise CheckpointError(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base model")
        base = config.get("base_model_name_or_path")
        base = base if isinstance(base, str) and base else None
        ours = config.get(_OURS)
        if ours is not None and (not isinstance(ours, dict) or ours.get("format") not in FORMATS):
            raise CheckpointError(f"{_OURS} names no format that is known")
        if ours is not None and ours["format"] != "peft":
            spec = LoraSpec.from_json(ours.get("spec"))
            return cls(ours["format"], spec, base, False)
        for name in ("r", "lora_alpha"):
            if name not in config:
                raise CheckpointError(f"{name} is missing")
        spec = LoraSpec(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=_names(config, "target_modules"),
            dropout=config.get("lora_dropout", 0.0),
            parameters=_list(config, "target_parameters"),
            exclude=_names(config, "exclude_modules"),
            rank_pattern=_pattern(config, "rank_pattern"),
            alpha_pattern=_pattern(config, "alpha_pattern"),
            rslora=config.get("use_rslora", False),
            dora=config.get("use_dora", False),
            modules_to_save=_list(config, "modules_to_save"),
            dropout_pattern=_pattern(ours or {}, "dropout_pattern"),
            layers_to_transform=_several(config.get("layers_to_transform")),
            layers_pattern=_several(config.get("layers_pattern")),
        )
        return cls("peft", spec, base, bool(config.get("ensure_weight_tying")))


def _list(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{name} is {shown(json.dumps(value))}, expected names")
    return tuple(value)


def _several(value: Any) -> tuple[Any, ...]:
    """One, several or none."""
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _names(config: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = config.get(name)
    return value if isinstance(value, str) and value else _list(config, name)


def _pattern(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is {shown(json.dumps(value))}, expected patterns and numbers")
    return value


def config_json(adapter: Adapter, dress: str) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter in a dress."""
    spec = adapter.spec
    common: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "modules_to_save": list(spec.modules_to_save) or None,
        "ensure_weight_tying": any(
            t.kind == "saved" and bool(adapter.table.copies_of(t.name)) for t in adapter.targets
        ),
    }
    if dress == "peft":
        modules, parameters = _peft_targets(adapter)
        # PEFT has one dropout for all: the rest goes into an entry of our own, which it leaves alone.
        patterns = {"dropout_pattern": dict(spec.dropout_pattern)}
        common |= {_OURS: {"format": dress, **patterns}} if spec.dropout_pattern else {}
        return common | {
            "r": spec.rank,
            "lora_alpha": _integral(spec.alpha),
            "target_modules": modules,
            "target_parameters": parameters or None,
            "exclude_modules": (spec.exclude if isinstance(spec.exclude, str) else list(spec.exclude)) or None,
            "rank_pattern": dict(spec.rank_pattern),
            "layers_to_transform": list(spec.layers_to_transform) or None,
            "layers_pattern": list(spec.layers_pattern) or None,
            "alpha_pattern": {pattern: _integral(alpha) for pattern, alpha in spec.alpha_pattern.items()},
        }
    # One rank and one scaling: of the largest rank, which the engine has to have room for. Not all engines know rsLoRA,
    # so alpha is what gives the scaling without it.
    largest = max(adapter.targets, key=lambda target: target.rank)
    return common | {
        "r": largest.rank,
        "lora_alpha": _integral(largest.scaling * largest.rank),
        "use_rslora": False,
        "target_modules": engine_targets(dress, adapter.targets, adapter.table),
        _OURS: {"format": dress, "spec": spec.to_json()},
    }


def _peft_targets(adapter: Adapter) -> tuple[str | list[str], list[str]]:
    """(target_modules, target_parameters). `all-linear` is spelled out, as PEFT spells it out when it saves."""
    spec = adapter.spec
    if isinstance(spec.targets, str) and spec.targets.lower() != ALL_LINEAR:
        return spec.targets, list(spec.parameters)
    parameters = named_parameters(spec, adapter.table)
    modules: dict[str, None] = {}
    for item in (spec.targets,) if isinstance(spec.targets, str) else spec.targets:
        if item.lower() == ALL_LINEAR:
            everything = resolve(LoraSpec(1, 1, ALL_LINEAR), adapter.table)
            modules |= dict.fromkeys(target.module for target in everything)
        elif item not in parameters:
            modules[item] = None
    # Not None where there are none: PEFT has targets of its own for this model then.
    return list(modules), list(dict.fromkeys((*spec.parameters, *parameters)))


def _integral(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def open_peft(stack: ExitStack, path: str | Path, table: Table) -> Adapter:
    """Open a folder in any dress, for the model of `table`.

    Raises CheckpointError: what `PeftConfig.read` raises; a target that matches nothing; a tensor that is missing, that
    no target asks for, or of another shape, as in an adapter for another model. Reading a tensor raises it where the
    copies of a dress (the A of gate and up; K that serves as V) differ from each other.
    """
    folder = Path(path)
    config = PeftConfig.read(folder)
    try:
        targets = resolve(config.spec, table)
        _check_tied(config, targets, table)
    except BridgeError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    source = stack.enter_context(HfFolder(folder, single=WEIGHTS_FILE))
    stored: dict[tuple[str, Part], list[Piece]] = {}
    for piece in pieces(config.dress, targets, table):
        stored.setdefault((piece.target.name, piece.part), []).append(piece)
    _check_tensors(source, [piece for listed in stored.values() for piece in listed])

    def value(target: Target, part: Part) -> Tensor:
        return _assembled(source, stored[target.name, part])

    def dtype(target: Target, part: Part) -> str:
        return source.tensors[stored[target.name, part][0].key].dtype

    files = (folder / CONFIG_FILE, *source.files)
    assets = adapter_assets(source.assets)
    return Adapter(
        folder, table, config.spec, targets, value, dtype, files, config.base, assets_folder=folder, assets=assets
    )


def _check_tied(config: PeftConfig, targets: Sequence[Target], table: Table) -> None:
    """Without `ensure_weight_tying` PEFT trains a copy of a saved embedding; with it, adapters are the head's too."""
    for target in (t for t in targets if table.copies_of(t.name)):
        if target.kind == "saved" and not config.ties:
            raise CheckpointError(
                f"modules_to_save has {target.module}, which is tied to the head, without ensure_weight_tying: that "
                "unties them, and here they are one"
            )
        if target.kind == "embedding" and config.ties:
            raise CheckpointError(f"ensure_weight_tying with an adapter of {target.module} is not supported")


def _check_tensors(source: HfFolder, expected: list[Piece]) -> None:
    file = source.files[0]
    kinds: dict[tuple[str, Part], tuple[str, str]] = {}
    for piece in expected:
        found = source.tensors.get(piece.key)
        if found is None:
            raise CheckpointError(f"{file}: has no {shown(piece.key)}: incomplete, or an adapter for another model")
        if found.shape != piece.shape:
            raise CheckpointError(
                f"{file}: {shown(piece.key)} has the shape {list(found.shape)}, expected {list(piece.shape)} (rank "
                f"{piece.target.rank}): an adapter for another model, or of another rank than {CONFIG_FILE} says"
            )
        if found.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"{file}: {shown(piece.key)} is {found.dtype}, which is not supported")
        kind, first = kinds.setdefault((piece.target.name, piece.part), (found.dtype, piece.key))
        if kind != found.dtype:
            raise CheckpointError(f"{file}: {shown(piece.key)} is {found.dtype}, {shown(first)} is {kind}")
    known = {piece.key for piece in expected}
    # Beside the adapter of an embedding, PEFT stores the embedding that it adapts.
    known |= {f"{p.key.rpartition('.lora_')[0]}.base_layer.weight" for p in expected if p.target.kind == "embedding"}
    for name in source.tensors:
        if name not in known:
            raise CheckpointError(f"{file}: holds {shown(name)}, which no target of {CONFIG_FILE} asks for")


def _assembled(source: HfFolder, parts: list[Piece]) -> Tensor:
    """The canonical tensor whose pieces are stored."""
    target, part = parts[0].target, parts[0].part
    whole = torch.empty(target.shape_of(part), dtype=TORCH_DTYPES[source.tensors[parts[0].key].dtype])
    for piece in parts:
        info = source.tensors[piece.key]
        buffer = np.empty(info.nbytes, dtype=np.uint8)
        source.read_rows(piece.key, 0, num_rows(info.shape), buffer)
        view = piece.view(whole)
        stored = torch.from_numpy(buffer).view(whole.dtype).view(view.shape)
        if piece.again and not torch.equal(_bits(view), _bits(stored)):
            first = parts[0].key
            raise CheckpointError(
                f"{source.files[0]}: {shown(piece.key)} is not the same as {shown(first)}: together they are no "
                f"adapter of {target.name}, which serves for both"
            )
        view.copy_(stored)
    return whole


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def write_peft(
    target: str | Path,
    adapter: Adapter,
    *,
    dress: str = "peft",
    overwrite: bool = False,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Conversion:
    """Write an adapter as a folder in a dress; complete or absent.

    Raises UsageError (what a folder or the dress cannot hold, an existing target) and CheckpointError.
    """
    check_servable(dress, adapter.targets)
    planned = list(pieces(dress, adapter.targets, adapter.table))
    dtypes = {(t.name, part): adapter.dtype(t, part) for t in adapter.targets for part in t.parts}
    specs = [TensorSpec(p.key, dtypes[p.target.name, p.part], p.shape) for p in planned]
    total = sum(spec.nbytes for spec in specs)
    home = adapter.assets_folder or adapter.path
    text = json.dumps(config_json(adapter, dress), indent=2, sort_keys=True) + "\n"
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
