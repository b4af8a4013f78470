"""The tensors of a PEFT folder by the names that PEFT gives them for this model, whichever class or tool wrote them.

Read as the same adapter: names of the text class for a multimodal base and the reverse, names without PEFT's prefix or
with the adapter's own in them, experts of other tools (`lora.foreign_experts`), factors of k and v in layers that share
K/V (which have no such weight), and copies of the base's embedding. What is left over is refused, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bridge.errors import CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.geometry.towers import Towers
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import printable
from bridge.lora.foreign_experts import find_experts
from bridge.lora.formats import PREFIX, StoredTensor, stored_tensors
from bridge.lora.peft_config import CONFIG_FILE, PeftConfig
from bridge.lora.spec import Factor, LoraSpec, Target, endings, spelled_out
from bridge.lora.targets import HEAD, module_name, module_names, resolve
from bridge.mapping import Table, table_for
from bridge.mapping.modalities import MODULES
from bridge.mapping.unified import in_memory

# `lora_A.default.weight`: with the name that the adapter had in memory.
_NAMED = re.compile(r"(\.lora_[AB]|\.lora_embedding_[AB]|\.lora_magnitude_vector)\.(?!weight$)([^.]+)(\.weight)?$")
# The decoder of the multimodal class, of that without a head, of the text class, and of that without a head.
_DECODER = re.compile(r"(model\.language_model\.|language_model\.|model\.|)(?:layers\.\d+\.|embed_tokens|norm\.)")
_TOWERS = re.compile(rf"(model\.)?({'|'.join(MODULES)})\.")


@dataclass(frozen=True)
class Stored:
    """What a folder holds, as an adapter of this model.

    `pieces`: by (HF name on disk, part), under names that `keys` gives those in the file for. `copies`: (HF name, key
    in the file) of weights of the base that are stored beside the factors. `notes`: see `Adapter`.
    """

    spec: LoraSpec
    targets: tuple[Target, ...]
    stored_tensors: Mapping[tuple[str, Factor], Sequence[StoredTensor]]
    keys: Mapping[str, str]
    copies: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_names(config: PeftConfig, source: HfFolder, table: Table) -> Stored:
    """Account for every tensor of a folder. Raises a BridgeError that names the tensor, or the field of the config."""
    file = source.files[0]
    notes, ours = list(config.notes), table.geometry.in_class(table.geometry.prefix)
    keys, theirs = _with_head(_with_prefix(source.tensors, file), ours, file)
    named = table if theirs == ours else table_for(_other_class(table.geometry))
    if named is not table:
        notes.append(f"names are those of another class of the model ({theirs}layers), read as {ours}layers")
    spec = _without_idle(config.spec, named)
    experts = find_experts(keys, file) if config.foreign else None
    if experts is None:
        targets = resolve(spec, named)
    else:
        targets = experts.targets(spec, named, file)
        notes.append(experts.note)
        if config.spec.dropout:
            notes.append(f"lora_dropout ({config.spec.dropout:g}) is that of the linears: experts have none here")
    _check_tied(config, targets, named, keys)
    if experts is not None or named is not table:
        spec = spelled_out(spec, [replace(t, module=_moved(t.module, theirs, ours)) for t in targets])
    adapter_format = "vllm" if config.foreign and _has_v_for_k(keys, named) else config.adapter_format
    on_disk = partial(_moved, theirs=named.geometry.prefix, ours=table.geometry.prefix)
    found: dict[tuple[str, Factor], list[StoredTensor]] = {}
    for piece in stored_tensors(adapter_format, targets, named, None if experts is None else experts.stored_tensors):
        found.setdefault((on_disk(piece.target.name), piece.part), []).append(piece)
    _check_tensors(source, [piece for listed in found.values() for piece in listed], keys)
    known = {piece.key for listed in found.values() for piece in listed}
    idle, copies = [], []
    for key in (key for key in keys if key not in known):
        what, name = _left_over(key.removeprefix(PREFIX), named, f"{file}: holds {printable(keys[key])}")
        if what == "idle":
            idle.append(key.removeprefix(PREFIX))
        else:
            copies.append((on_disk(name), keys[key]))
    if idle:
        notes.append(
            f"{len(idle)} tensors act on nothing and are left out: layers that share K/V have no k and v of their own "
            f"({', '.join(idle[:2])}{', ...' if len(idle) > 2 else ''})"
        )
    notes += [f"{printable(key)} is the base's own weight and left out" for _, key in copies]
    return Stored(spec, resolve(spec, table), found, keys, tuple(copies), tuple(notes))


def _with_prefix(names: Iterable[str], file: Path) -> dict[str, str]:
    """Names as PEFT saves them -> those in the file, which may be those of a state dict."""
    keys: dict[str, str] = {}
    adapters: set[str] = set()
    for name in names:
        key = name if name.startswith(PREFIX) else PREFIX + name
        match = _NAMED.search(key)
        if match is not None:
            adapters.add(match[2])
            key = key[: match.start()] + match[1] + (".weight" if match[1] in (".lora_A", ".lora_B") else "")
        if key in keys:
            raise CheckpointError(f"{file}: {printable(name)} and {printable(keys[key])} are one tensor")
        keys[key] = name
    if len(adapters) > 1:
        raise CheckpointError(f"{file}: holds several adapters, {', '.join(sorted(map(printable, adapters)))}")
    return keys


def _with_head(keys: dict[str, str], ours: str, file: Path) -> tuple[dict[str, str], str]:
    """The names as a class with a head has them, and what those of the decoder begin with."""
    found = {match[1] for key in keys if (match := _DECODER.match(key.removeprefix(PREFIX)))}
    if len(found) > 1:
        listed = ", ".join(f"{prefix}layers" for prefix in sorted(found))
        raise CheckpointError(f"{file}: holds tensors of several classes of models ({listed})")
    theirs = found.pop() if found else ours
    if theirs.startswith("model."):
        return keys, theirs
    return {f"{PREFIX}model.{key.removeprefix(PREFIX)}": name for key, name in keys.items()}, f"model.{theirs}"


def _other_class(geometry: Geometry) -> Geometry:
    """The decoder alone, as the text class names it or the multimodal one: no adapter of a tower is of both."""
    other = not geometry.multimodal
    return replace(geometry, base="model.", multimodal=other, placeholders=None, **vars(Towers()))


def _moved(name: str, theirs: str, ours: str) -> str:
    return name if name == HEAD or not name.startswith(theirs) else ours + name.removeprefix(theirs)


def _without_idle(spec: LoraSpec, table: Table) -> LoraSpec:
    """Without items that name only what acts on nothing, or what is tied to something else that is named."""
    if isinstance(spec.targets, tuple):
        idle = {ending for name in table.carried for ending in endings(module_name(table, name))}
        idle -= {ending for name in module_names(table) for ending in endings(name)}
        spec = replace(spec, targets=tuple(item for item in spec.targets if item not in idle))
    tied = [module_name(table, name) for name in table.copies]
    sources = [module_name(table, entry.sources[0].name) for entry in table.copies.values()]
    if any(source.endswith(item) for item in spec.modules_to_save for source in sources):
        untied = (item for item in spec.modules_to_save if not any(name.endswith(item) for name in tied))
        spec = replace(spec, modules_to_save=tuple(untied))
    return spec


def _check_tied(config: PeftConfig, targets: Sequence[Target], table: Table, keys: Mapping[str, str]) -> None:
    """Without `ensure_weight_tying` PEFT trains a copy of a saved embedding; with it, adapters are the head's too."""
    for target in (t for t in targets if table.copies_of(t.name)):
        heads = [PREFIX + name for name in table.copies_of(target.name)]
        # Stored both, they are compared when they are read: the same bits are tied, whatever the config says.
        if target.kind == "saved" and not config.ties and not all(head in keys for head in heads):
            raise UsageError(
                f"modules_to_save has {target.module}, which is tied to the head, without ensure_weight_tying: that "
                "unties them, and here they are one"
            )
        if target.kind == "embedding" and config.ties:
            raise UsageError(f"ensure_weight_tying with an adapter of {target.module} is not supported")


def _has_v_for_k(keys: Iterable[str], table: Table) -> bool:
    """Whether k's factors are stored once more as v's where V is K: so that an engine serves them."""
    values = (f"layers.{layer.index}.self_attn.v_proj.lora_" for layer in table.geometry.layers if layer.k_eq_v)
    prefix = table.geometry.in_class(table.geometry.prefix)
    starts = tuple(f"{PREFIX}{prefix}{value}" for value in values)
    return any(key.startswith(starts) for key in keys)


def _left_over(key: str, table: Table, holds: str) -> tuple[str, str]:
    """What a tensor is that no target asks for: ("idle" or "copy", HF name). Raises CheckpointError for all else."""
    names = {in_memory(n, table.geometry): n for n in (*table.by_hf_name, *table.copies, *table.carried)}
    module, factor, _ = key.partition(".lora_")
    name = names.get(f"{module}.weight" if factor else key.replace(".base_layer.", "."), "")
    if name in table.carried:
        return "idle", name
    entry = table.copies.get(name) or table.by_hf_name.get(name, (None, 0))[0]
    if not factor and entry is not None and (entry.row.embedding or name == HEAD):
        return "copy", entry.sources[0].name
    why = f"which no target of {CONFIG_FILE} asks for"
    if "trainable_tokens" in key:
        why = "rows of an embedding trained beside the factors, which is no adapter here (trainable_token_indices)"
    elif key.endswith(".bias"):
        why = "a bias that was trained, which adapters here have not (bias, lora_bias)"
    elif not name and _TOWERS.match(key):
        why = "which adapts a tower or projector that this base, as its config has it, is without"
    elif not factor and name:
        why = f"a whole weight, which modules_to_save of {CONFIG_FILE} does not name"
    raise CheckpointError(f"{holds}, {why}")


def _check_tensors(source: HfFolder, expected: list[StoredTensor], keys: Mapping[str, str]) -> None:
    file = source.files[0]
    dtypes: dict[tuple[str, Factor], tuple[str, str]] = {}
    for piece in expected:
        found = source.tensors[keys[piece.key]] if piece.key in keys else None
        if found is None:
            raise CheckpointError(f"{file}: has no {printable(piece.key)}: incomplete, or an adapter for another model")
        if found.shape != piece.shape:
            raise CheckpointError(
                f"{file}: {printable(piece.key)} has the shape {list(found.shape)}, expected {list(piece.shape)} (rank "
                f"{piece.target.rank}): an adapter for another model, or of another rank than {CONFIG_FILE} says"
            )
        if found.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"{file}: {printable(piece.key)} is {found.dtype}, which is not supported")
        kind, first = dtypes.setdefault((piece.target.name, piece.part), (found.dtype, piece.key))
        if kind != found.dtype:
            raise CheckpointError(f"{file}: {printable(piece.key)} is {found.dtype}, {printable(first)} is {kind}")
