"""`adapter_config.json`: what PEFT writes about an adapter, read strictly and written.

Every field of PEFT 0.21's `LoraConfig` is in one of the tables below: read, without effect on what the stored tensors
do, or refused by name. A field that is in none of them is refused where it says anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, CheckpointError
from bridge.hf.tensors import printable
from bridge.lora.adapter import Adapter
from bridge.lora.formats import FORMATS, engine_targets
from bridge.lora.spec import ALL_LINEAR, LoraSpec
from bridge.lora.targets import named_parameters, resolve

CONFIG_FILE = "adapter_config.json"
# Our own entry in a config: the format, and the spec as it was in a format that PEFT does not read; in PEFT's own only
# what PEFT has no field for.
_OURS = "gemma4_bridge"
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "modules_to_save", "ensure_weight_tying", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "fan_in_fan_out", _OURS),
}
# Who wrote the adapter, how it began, and how other layers than transformers' would hold it.
_WITHOUT_EFFECT = {
    *("auto_mapping", "inference_mode", "peft_version", "megatron_config", "megatron_core", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "ephemeral_gpu_offload", "qalora_group_size"),
}
_REFUSED = {
    "trainable_token_indices": "trains rows of the embedding, which is no adapter here; merge it in PEFT "
    "(merge_and_unload), or train the whole embedding (modules_to_save)",
    "lora_bias": "adds a bias to B, which adapters here have not",
    "layer_replication": "repeats layers of the base, which makes another model of it",
    "alora_invocation_tokens": "lets the adapter act behind certain tokens only",
    "use_qalora": "pools the input of A",
    "use_bdlora": "makes factors of blocks",
    "arrow_config": "chooses among several adapters, token by token",
    "kasa_config": "adds singular values to the factors",
    "monteclora_config": "samples the factors",
    "velora_config": "compresses what the backward pass keeps",
}
# Initialisations that leave the base as it is. The others (pissa, olora, ...) train beside a changed base.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_BIASES = ("none", "all", "lora_only")
# Tasks whose models are those here; the others have heads of their own in the place of the vocabulary's.
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says: the format of the tensors, what they adapt, and the model's folder or id.

    `foreign`: the format is not one that we wrote down, so the names of the tensors have to tell. `revision`: of the
    base on the hub. `ties`: what was done to an embedding was done to the head that is tied to it. `notes`: see
    `Adapter`.
    """

    adapter_format: str
    spec: LoraSpec
    base: str | None
    ties: bool = False
    foreign: bool = False
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> PeftConfig:
        """Raises CheckpointError: no such file, no JSON, not LoRA, an option that is not supported."""
        path = Path(folder) / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; a PEFT adapter has one{other_adapters(path.parent)}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({printable(str(error))})") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: holds no JSON object")
        try:
            return cls._parse(config)
        except (BridgeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, config: dict[str, Any]) -> PeftConfig:
        notes = tuple(_check_fields(config))
        base, revision = _text(config, "base_model_name_or_path"), _text(config, "revision")
        ours = config.get(_OURS)
        if ours is not None and (not isinstance(ours, dict) or ours.get("format") not in FORMATS):
            raise CheckpointError(f"{_OURS} names no format that is known")
        if ours is not None and ours["format"] != "peft":
            spec = LoraSpec.from_json(ours.get("spec"))
            return cls(ours["format"], spec, base, revision=revision, notes=notes)
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
        return cls("peft", spec, base, bool(config.get("ensure_weight_tying")), True, revision, notes)


def other_adapters(folder: Path) -> str:
    """The end of an error about a folder without an adapter: those that lie in its own folders, if there are any."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    return f"; there are adapters in its folders {', '.join(found[:6])}: name one of them" if found else ""


def _check_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a config is to be said. Raises CheckpointError for what it says and adapters here have not."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for name, value in config.items():
        if name in _READ or name in _WITHOUT_EFFECT or value is None or value is False or value in ("", [], {}):
            continue
        why = f": it {_REFUSED[name]}" if name in _REFUSED else " (no field of PEFT 0.21)"
        raise CheckpointError(f"{printable(name)} is {printable(json.dumps(value))}, which is not supported{why}")
    if config.get("task_type") not in _TASKS:
        raise CheckpointError(f"task_type is {config['task_type']!r}: a model with another head")
    if config.get("bias", "none") not in _BIASES:
        raise CheckpointError(f"bias is {config['bias']!r}, expected one of {', '.join(_BIASES)}")
    if config.get("init_lora_weights", True) not in _INITS:
        raise CheckpointError(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base model")
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r} in {CONFIG_FILE}, and no bias is stored: read as 'none'"
    if config.get("fan_in_fan_out"):
        yield f"fan_in_fan_out in {CONFIG_FILE} is left out, as PEFT does: no weight of this model lies that way"


def _text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) and value else None


def _list(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{name} is {printable(json.dumps(value))}, expected names")
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
        raise CheckpointError(f"{name} is {printable(json.dumps(value))}, expected patterns and numbers")
    return value


def config_json(adapter: Adapter, adapter_format: str) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter in a format."""
    spec = adapter.spec
    common: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
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
    if adapter_format == "peft":
        modules, parameters = _peft_targets(adapter)
        # PEFT has one dropout for all: the rest goes into an entry of our own, which it leaves alone.
        patterns = {"dropout_pattern": dict(spec.dropout_pattern)}
        common |= {_OURS: {"format": adapter_format, **patterns}} if spec.dropout_pattern else {}
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
        "target_modules": engine_targets(adapter_format, adapter.targets, adapter.table),
        _OURS: {"format": adapter_format, "spec": spec.to_json()},
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
