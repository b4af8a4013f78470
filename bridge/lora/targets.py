"""Which weights a `LoraSpec` means, out of the rows of the mapping table.

The rules are PEFT's (`peft.tuners.tuners_utils`: `check_target_module_exists`, `_maybe_include_all_linear_layers`,
`_inject_parameters`), over the module names that the table's tensors have in transformers' memory. What a layer does
not have (v_proj where V is K, k_proj and v_proj of layers that share K/V) is in no row, and so is never hit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from bridge.errors import UsageError
from bridge.lora.spec import ALL_LINEAR, Kind, LoraSpec, Target, endings
from bridge.mapping import HfTensor, Table
from bridge.mapping.unified import in_memory

_WEIGHT = ".weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Candidate:
    """A tensor of the table that can have an adapter; `module` as in `Target`."""

    tensor: HfTensor
    module: str
    kind: Kind
    head: bool


def resolve(spec: LoraSpec, table: Table) -> tuple[Target, ...]:
    """The adapted weights, in the order of the table, and those of `modules_to_save`.

    Raises UsageError, naming it: a target or parameter that matches nothing, a module that cannot have an adapter (a
    norm, a convolution, the wrapper of a tower's linear), an option that experts do not allow.
    """
    candidates = _candidates(table)
    modules = {c.module: c for c in candidates if c.kind != "experts"}
    parameters = {c.module: c for c in candidates if c.kind == "experts"}
    everything = module_names(table)
    chosen: dict[str, str] = {}
    for name, wanted in _matches(spec.parameters, "parameters", [], parameters):
        chosen[name] = wanted
    linears = [name for name, c in modules.items() if c.kind == "linear" and not c.head]
    for name, wanted in _matches(spec.targets, "targets", linears, everything, parameters):
        # A parameter is not a module: exclude and modules_to_save keep adapters off modules only.
        if name in parameters or (not _kept_off(spec, name) and (name == wanted or spec.in_layers(name))):
            chosen[name] = wanted
    for name, wanted in chosen.items():
        if name not in modules and name not in parameters:
            raise UsageError(f"lora: target {wanted!r} matches {name}, {_why_not(name, modules, table)}")
    hit = [c for c in candidates if c.module in chosen]
    if not hit:
        raise UsageError(
            "lora: targets, less what is excluded or in other layers, leave no weight of this model to adapt"
            f"{', and modules_to_save alone are no adapter (as in PEFT)' if spec.modules_to_save else ''}"
        )
    if any(c.kind == "experts" for c in hit):
        # PEFT knows one dropout for all, and refuses any beside experts.
        if spec.dropout or any(spec.dropout_of(c.module) for c in hit if c.kind == "experts"):
            raise UsageError("lora: dropout must be 0 where experts are targeted (as in PEFT)")
        if spec.dora:
            raise UsageError("lora: dora does not work where experts are targeted (as in PEFT)")
    patterns_alone = replace(spec, dropout=0.0)
    for c in hit:
        if c.kind == "embedding" and patterns_alone.dropout_of(c.module):
            raise UsageError(f"lora: dropout_pattern gives one to {c.module}, and embeddings have none")
    adapted = (
        Target(
            name=c.tensor.name,
            shape=c.tensor.shape,
            rank=spec.rank_of(c.module),
            alpha=spec.alpha_of(c.module),
            rslora=spec.rslora,
            module=c.module,
            kind=c.kind,
            dropout=spec.dropout_of(c.module),
            dora=spec.dora,
        )
        for c in hit
    )
    saved = tuple(_saved(spec, table))
    twice = {c.tensor.name for c in hit} & {target.name for target in saved}
    if twice:
        raise UsageError(f"lora: {min(twice)} is in modules_to_save and a target; exclude it from the targets")
    return (*adapted, *saved)


def _saved(spec: LoraSpec, table: Table) -> Iterator[Target]:
    """The tensors of `modules_to_save`, in the order of the table.

    Raises UsageError, naming it: a module that is not there, that holds a buffer, or that has only a part of a weight
    which Megatron keeps fused.
    """
    entries = [(tensor, entry) for entry in table.entries.values() for tensor in entry.sources]
    modules = {t.name: in_memory(t.name, table.geometry).rpartition(".")[0] for t, _ in entries}
    names: set[str] = set()
    for wanted in spec.modules_to_save:
        found = {name for name, module in modules.items() if any(m.endswith(wanted) for m in _above(module))}
        for copied, entry in table.copies.items():
            if not found and any(m.endswith(wanted) for m in _above(module_name(table, copied))):
                tied = entry.sources[0].name
                raise UsageError(
                    f"lora: modules_to_save: {wanted!r} is tied to {tied}: name that, and both are trained"
                )
        if not found:
            raise UsageError(f"lora: modules_to_save: {wanted!r} matches nothing{_close(wanted, modules.values())}")
        names |= found
    for tensor, entry in entries:
        if tensor.name not in names:
            continue
        if not entry.row.trainable:
            raise UsageError(f"lora: modules_to_save: {tensor.name} is a buffer, which is not trained; leave it out")
        for other in entry.sources:
            if other.name not in names:
                raise UsageError(
                    f"lora: modules_to_save: {tensor.name} is one weight with {other.name} here, and trained with it "
                    "or not at all"
                )
        whole = in_memory(tensor.name, table.geometry)
        yield Target(tensor.name, tensor.shape, 0, 0.0, False, whole, "saved")


def named_parameters(spec: LoraSpec, table: Table) -> tuple[str, ...]:
    """Those of `spec.targets` that mean expert parameters: endings that no module has."""
    modules = _by_ending(module_names(table))
    listed = () if isinstance(spec.targets, str) else spec.targets
    return tuple(item for item in listed if item.lower() != ALL_LINEAR and item not in modules)


def module_name(table: Table, hf_name: str) -> str:
    """Disk name of a weight -> the path of its module in transformers' memory, as PEFT spells it.

    An expert parameter keeps its own name: it is a parameter of the module `experts`.
    """
    return in_memory(hf_name, table.geometry).removesuffix(_WEIGHT)


def _candidates(table: Table) -> list[_Candidate]:
    found = []
    for entry in table.entries.values():
        for tensor, dimensions in zip(entry.sources, entry.row.shapes, strict=True):
            kind: Kind | None = None
            if tensor.name.endswith(_WEIGHT) and len(tensor.shape) == 2:
                kind = "embedding" if entry.row.embedding else "linear"
            elif len(tensor.shape) == 3 and dimensions[0] == "experts":
                kind = "experts"
            if kind is not None:
                head = tensor.name == HEAD
                found.append(_Candidate(tensor, module_name(table, tensor.name), kind, head))
    return found


def module_names(table: Table) -> dict[str, None]:
    """Every module that holds a tensor, itself or in a module below; a tied head is one too."""
    tensors = [*table.by_hf_name, *table.copies]
    return {m: None for t in tensors for m in _above(in_memory(t, table.geometry).rpartition(".")[0])}


def _above(module: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _matches(
    wanted: str | tuple[str, ...],
    field: str,
    linears: Iterable[str],
    names: Iterable[str],
    parameters: Iterable[str] = (),
) -> Iterator[tuple[str, str]]:
    """(name, the target that matches it), among `names`; an ending that is in none of them may mean `parameters`."""
    if isinstance(wanted, str) and wanted.lower() != ALL_LINEAR:
        hit = [name for name in names if re.fullmatch(wanted, name)]
        if not hit:
            raise UsageError(f"lora: {field}: the regular expression {wanted!r} matches nothing in this model")
        yield from ((name, wanted) for name in hit)
        return
    by_ending, fallback = _by_ending(names), _by_ending(parameters)
    for item in (wanted,) if isinstance(wanted, str) else wanted:
        hit = list(linears) if item.lower() == ALL_LINEAR else by_ending.get(item) or fallback.get(item, [])
        if not hit:
            close = _close(item, [*by_ending, *fallback])
            raise UsageError(f"lora: {field}: {item!r} matches nothing in this model{close}")
        yield from ((name, item) for name in hit)


def _by_ending(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        for ending in endings(name):
            found.setdefault(ending, []).append(name)
    return found


def _kept_off(spec: LoraSpec, module: str) -> bool:
    """Whether `exclude` or `modules_to_save` keep adapters off a module."""
    if isinstance(spec.exclude, str):
        excluded = bool(spec.exclude) and re.fullmatch(spec.exclude, module) is not None
    else:
        excluded = any(ending in spec.exclude for ending in endings(module))
    return excluded or any(f".{saved}." in f".{module}." for saved in spec.modules_to_save)


def _why_not(module: str, modules: Mapping[str, _Candidate], table: Table) -> str:
    if f"{module}{_WEIGHT}" in table.copies:
        return "which is tied to the embedding and has no weight of its own"
    if f"{module}.linear" in modules:
        return f"which wraps a linear: target {module.rpartition('.')[2]}.linear, or leave the towers out"
    return "which is no linear and no embedding"


def _close(wanted: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(wanted, [n for n in names if not n[0].isdigit()], n=3, cutoff=0.6)
    return f" (close: {', '.join(near)})" if near else ""
