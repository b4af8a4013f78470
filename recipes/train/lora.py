"""LoRA in a training run: what is adapted, the adapters of the model, and what `adapter.json` says of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge import Gemma4Bridge
from bridge.convert.atomic import Notify
from bridge.convert.manifest import ADAPTER_FILE
from bridge.errors import UsageError
from bridge.lora.checkpoint import AdapterFolder, AdapterManifest
from bridge.lora.initial import initial_values
from bridge.lora.inject import attach, fill, start_magnitudes
from bridge.lora.merge import merge_adapter
from bridge.lora.source import open_both
from bridge.lora.spec import LoraSpec
from bridge.lora.table import AdapterTable, adapter_table
from bridge.lora.targets import HEAD, resolve
from bridge.megatron.fake_quant import round_frozen
from bridge.megatron.model import Gemma4Model
from recipes.config import Recipe
from recipes.training_config import LoraConfig


def spec_of(config: LoraConfig) -> LoraSpec | None:
    """What a recipe adapts; None where it trains weights. Raises a BridgeError."""
    if config.adapter is not None:
        spec, usual = AdapterFolder.open(config.adapter).manifest.spec, _options(LoraConfig())
        other = [name for name, value in _options(config).items() if value not in (usual[name], getattr(spec, name))]
        if other:
            # All of it at once: a shipped recipe sets several keys, and the user none of them.
            listed = ", ".join(f"lora.{n} is {getattr(config, n)!r}, there {getattr(spec, n)!r}" for n in other)
            back = " ".join(shlex.quote(f"lora.{n}={_typed(getattr(LoraConfig(), n))}") for n in other)
            raise UsageError(f"lora.adapter={config.adapter} says what is adapted, and how; {listed}: add {back}")
        return spec
    return LoraSpec(**_options(config)) if config.rank else None


def _options(config: LoraConfig) -> dict[str, Any]:
    """The fields of a `LoraSpec`, as a recipe says them."""
    said = {f.name: getattr(config, f.name) for f in fields(LoraSpec)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


def _typed(value: Any) -> str:
    """A value as it is typed behind a key."""
    return value if isinstance(value, str) else json.dumps(value)


def table_of(config: LoraConfig, spec: LoraSpec, bridge: Gemma4Bridge) -> AdapterTable:
    """The table of the run's adapters.

    Raises UsageError for what matches nothing, is not built, or is the adapter of another model.
    """
    targets = resolve(spec, bridge.table)
    if any(target.name == HEAD and target.kind != "saved" for target in targets):
        raise UsageError(
            "lora: lm_head can have no adapter here; leave it out, or train it whole: lora.modules_to_save"
        )
    table = adapter_table(bridge.table, targets)
    if config.adapter is not None:
        held = AdapterFolder.open(config.adapter).table.entries
        if {key: entry.shape for key, entry in held.items()} != {k: entry.shape for k, entry in table.entries.items()}:
            raise UsageError(f"{config.adapter}: the adapter of another model")
    return table


def add_adapters(recipe: Recipe, spec: LoraSpec, table: AdapterTable, models: Sequence[Gemma4Model]) -> None:
    """Freeze the model and give it adapters: PEFT's initial values, or those of `lora.adapter`."""
    attach(models, table)
    # No checkpoint of the run holds the base. Before the magnitudes, which are those of what is multiplied by.
    round_frozen(models, in_place=True)
    if recipe.lora.adapter is not None:
        fill(models, table, AdapterFolder.open(recipe.lora.adapter).values())
        return
    # What is trained whole begins as the base has it.
    fill(models, table.factors(), initial_values(recipe.train.seed))
    if spec.dora:
        start_magnitudes(models)


def export_merged(recipe: Recipe, checkpoint: Path | None, target: Path, notify: Notify | None) -> None:
    """Write the base of a run with the adapters of a checkpoint (the latest one) as an HF folder. On one rank."""
    with ExitStack() as stack:
        run = checkpoint or Path(recipe.output)
        base, adapter = open_both(stack, run, recipe.model.hf or recipe.model.megatron)
        merge_adapter(base, adapter, target, overwrite=True, notify=notify)


def describe(recipe: Recipe, spec: LoraSpec, output: Path) -> None:
    """Write `adapter.json` of a run: of one that goes on, where its base is now.

    Raises UsageError where the folder holds a run with other adapters.
    """
    manifest = AdapterManifest(spec, recipe.model.hf, recipe.model.megatron)
    before = AdapterManifest.read(output) if (output / ADAPTER_FILE).is_file() else None
    if before is not None and before.spec != spec:
        raise UsageError(f"{output}: holds a run with other adapters ({_difference(before.spec, spec)})")
    if before != manifest:
        manifest.write(output)


def _difference(before: LoraSpec, now: LoraSpec) -> str:
    old, new = before.to_json(), now.to_json()
    key = next(key for key in old if old[key] != new[key])
    return f"lora.{key} was {old[key]!r}, is {new[key]!r}"
