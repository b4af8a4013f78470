"""Factors of experts as tools other than PEFT on transformers store them.

One by one, as the experts of a checkpoint that is not fused are named: `experts.3.gate_proj`, under `moe` or not, gate
and up apart (then each has an A of its own, and the two are one adapter of twice the rank here) or fused; or as stacks
of matrices, `experts.gate_up_proj` with A [E, r, in] and B [E, out, r]. Such folders list their modules in no way that
fits this model, so the names of the tensors tell what is adapted; rank and alpha are what the config gives those names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.errors import CheckpointError
from bridge.lora.formats import PREFIX, StoredTensor, each_expert, plain
from bridge.lora.spec import ALL_LINEAR, Factor, LoraSpec, Target, endings
from bridge.lora.targets import module_names, resolve
from bridge.mapping import Table

_ONE = re.compile(
    r"(?P<module>(?P<layer>.*layers\.\d+)\.(?P<room>(?:\w+\.)?experts)\.\d+\.(?P<name>\w+_proj))\.lora_[AB]\.weight"
)
_STACK = re.compile(r"(?P<module>(?P<layer>.*layers\.\d+)\.experts\.(?P<name>\w+_proj))\.lora_[AB]\.weight")
_PARAMETERS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class ForeignExperts:
    """How a folder stores them. `modules`: (layer, expert parameter) -> the names of their modules there.

    `room`: what the experts are numbered under; None where they are stacks of matrices. `own`: see `each_expert`.
    """

    modules: Mapping[tuple[str, str], tuple[str, ...]]
    room: str | None
    fused: bool

    @property
    def separate_a(self) -> bool:
        """Whether gate and up have an A each."""
        return self.room is not None and not self.fused

    @property
    def note(self) -> str:
        """What is to be said of it."""
        if self.room is None:
            return "experts are stored as stacks of matrices, as engines read them"
        twice = ": gate and up, which have an A each, are one adapter of twice the rank here" if self.separate_a else ""
        return f"experts are stored one by one ({self.room}.0.*){twice}"

    def stored_tensors(self, target: Target, part: Factor) -> Iterator[StoredTensor]:
        """The stored tensors of one target."""
        if self.room is None:
            yield plain(target, part)
        else:
            yield from each_expert(target, part, self.room, self.fused, self.separate_a)

    def targets(self, spec: LoraSpec, table: Table, file: Path) -> tuple[Target, ...]:
        """What the folder adapts: the modules that its config names, and the experts that it holds factors of.

        Raises a BridgeError: what `resolve` raises; experts of one layer with several ranks or alphas.
        """
        names = tuple(dict.fromkeys(f"experts.{name}" for _, name in self.modules))
        experts = resolve(LoraSpec(spec.rank, spec.alpha, parameters=names, rslora=spec.rslora), table)
        theirs = [*(module for held in self.modules.values() for module in held), *(t.module for t in experts)]
        modules = replace(spec, targets=_without(spec.targets, theirs, table), parameters=())
        adapted = resolve(modules, table) if modules.targets else ()
        return (*(self._sized(target, spec, file) for target in experts), *adapted)

    def _sized(self, target: Target, spec: LoraSpec, file: Path) -> Target:
        layer, _, name = target.module.rpartition(".experts.")
        held = self.modules.get((layer, name), ())
        sizes = {(spec.rank_of(module), spec.alpha_of(module)) for module in held}
        if len(sizes) > 1:
            raise CheckpointError(f"{file}: the experts of {layer} have several ranks or alphas, {sorted(sizes)}")
        rank, alpha = sizes.pop() if sizes else (spec.rank, spec.alpha)
        if self.separate_a and name == "gate_up_proj":
            # Of the same scaling: alpha / rank, or alpha / sqrt(rank).
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.rslora else 2)
        return replace(target, rank=rank, alpha=alpha)


def find_experts(keys: Iterable[str], file: Path) -> ForeignExperts | None:
    """How a folder stores experts, by its names; None where it has none, or has them as PEFT does.

    Raises CheckpointError for experts of several kinds.
    """
    keys = [key.removeprefix(PREFIX) for key in keys]
    found = [match for key in keys if (match := _ONE.fullmatch(key))]
    stacks = [match for key in keys if (match := _STACK.fullmatch(key))]
    rooms = {match["room"] for match in found} | ({"a stack"} if stacks else set())
    if len(rooms) > 1:
        raise CheckpointError(f"{file}: holds experts of several kinds: {', '.join(sorted(rooms))}")
    if not rooms:
        return None
    modules: dict[tuple[str, str], dict[str, None]] = {}
    for match in (*found, *stacks):
        name = _PARAMETERS.get(match["name"], match["name"])
        modules.setdefault((match["layer"], name), {})[match["module"]] = None
    fused = any(match["name"] == "gate_up_proj" for match in found)
    room = found[0]["room"] if found else None
    return ForeignExperts({place: tuple(held) for place, held in modules.items()}, room, fused)


def _without(targets: str | tuple[str, ...], theirs: list[str], table: Table) -> str | tuple[str, ...]:
    """The targets that mean modules of this model too, and not only those `theirs` experts."""
    ours = module_names(table)
    if isinstance(targets, str):
        hits = any(re.fullmatch(targets, name) for name in ours) or targets.lower() == ALL_LINEAR
        return targets if hits or not any(re.fullmatch(targets, name) for name in theirs) else ()
    only = {ending for name in theirs for ending in endings(name)} - {e for name in ours for e in endings(name)}
    return tuple(item for item in targets if item not in only)
