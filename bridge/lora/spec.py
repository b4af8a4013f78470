"""What an adapter is: its targets, ranks and scaling. The fields mean what PEFT's `LoraConfig` means by them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from bridge.errors import UsageError
from bridge.mapping.transforms import Shape

ALL_LINEAR = "all-linear"
Kind = Literal["linear", "experts", "embedding", "saved"]
# The tensors of an adapter: the two factors, and DoRA's magnitudes; or the weight itself, where it is trained whole.
Factor = Literal["A", "B", "magnitude", "weight"]


_PATTERNS = ("rank_pattern", "alpha_pattern", "dropout_pattern")


@dataclass(frozen=True)
class LoraSpec:
    """What a run adapts.

    `targets`: one string is a regular expression for whole module names, or `all-linear`; a tuple holds endings of
    module names (`q_proj`, `mlp.down_proj`), and may hold `all-linear` and endings that no module has but an expert
    parameter (`experts.gate_up_proj`). `parameters`: endings of the names of expert parameters, as PEFT's
    `target_parameters`. `exclude`: as `targets`, taken away from them. Names are those of transformers' modules.
    `rank_pattern` and `alpha_pattern`: regular expressions for the ends of names, the first that matches counts.
    `dropout_pattern`, which PEFT has not, is to `dropout` what they are to rank and alpha. `dora`: with magnitudes.
    `modules_to_save` are trained whole. `layers_to_transform`: endings in `targets` mean only modules whose names have
    one of these as their first number, behind one of `layers_pattern` where that is given.
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = ()
    dropout: float = 0.0
    parameters: tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    dropout_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError that names the field."""
        for name, rank in (("rank", self.rank), *((f"rank_pattern {k!r}", r) for k, r in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UsageError(f"lora: {name} is {rank!r}, expected a positive integer")
        for name, alpha in (
            ("alpha", self.alpha),
            *((f"alpha_pattern {k!r}", a) for k, a in self.alpha_pattern.items()),
        ):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise UsageError(f"lora: {name} is {alpha!r}, expected a number above 0")
        for name, dropout in (
            ("dropout", self.dropout),
            *((f"dropout_pattern {k!r}", d) for k, d in self.dropout_pattern.items()),
        ):
            if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
                raise UsageError(f"lora: {name} is {dropout!r}, expected 0 up to 1")
        for name in ("targets", "parameters", "exclude", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str) and name in ("targets", "exclude"):
                _compiled(value, name)
            elif not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                raise UsageError(f"lora: {name} is {value!r}, expected names")
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"lora: {name} is {getattr(self, name)!r}, expected true or false")
        if not isinstance(self.layers_to_transform, tuple) or not all(type(n) is int for n in self.layers_to_transform):
            raise UsageError(f"lora: layers_to_transform is {self.layers_to_transform!r}, expected numbers of layers")
        if self.layers_pattern and not self.layers_to_transform:
            raise UsageError("lora: layers_pattern needs layers_to_transform (as in PEFT)")
        endings_only = not isinstance(self.targets, str) and not any(t.lower() == ALL_LINEAR for t in self.targets)
        if self.layers_to_transform and not endings_only:
            raise UsageError("lora: layers_to_transform needs targets that are a list of endings (as in PEFT)")
        for pattern in self.layers_pattern:
            _compiled(pattern, "layers_pattern")
        for name in _PATTERNS:
            for pattern in getattr(self, name):
                _compiled(pattern, name)

    def rank_of(self, module: str) -> int:
        """The rank that `rank_pattern` gives a module (or an expert parameter) of that name."""
        return next((r for pattern, r in self.rank_pattern.items() if _at_end(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha that `alpha_pattern` gives a module (or an expert parameter) of that name."""
        return next((a for pattern, a in self.alpha_pattern.items() if _at_end(pattern, module)), self.alpha)

    def dropout_of(self, module: str) -> float:
        """The dropout that `dropout_pattern` gives a module of that name."""
        return next((d for pattern, d in self.dropout_pattern.items() if _at_end(pattern, module)), self.dropout)

    def in_layers(self, module: str) -> bool:
        """Whether `layers_to_transform` leave a module in that an ending in `targets` matches."""
        if not self.layers_to_transform:
            return True
        for pattern in self.layers_pattern or (r"[^.]+",):
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
            if found is not None:
                return int(found["layer"]) in self.layers_to_transform
        return False

    def to_json(self) -> dict[str, Any]:
        """For a manifest; `from_json` reads it."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, values: Any) -> LoraSpec:
        """The inverse of `to_json`. Raises UsageError that names the field."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, Mapping) or not {"rank", "alpha"} <= set(values) <= known:
            raise UsageError(f"lora: expected the fields {', '.join(sorted(known))}")
        for name in _PATTERNS:
            if not isinstance(values.get(name, {}), Mapping):
                raise UsageError(f"lora: {name} is {values[name]!r}, expected patterns and numbers")
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)


@dataclass(frozen=True)
class Target:
    """One adapted weight: `name` and `shape` are those of the tensor on disk, `module` is what PEFT calls it.

    `module` is the name of the module in transformers' memory, or of the parameter where experts are targeted, or the
    weight is one of `modules_to_save` (kind `saved`, of rank 0).
    """

    name: str
    shape: Shape
    rank: int
    alpha: float
    rslora: bool
    module: str
    kind: Kind = "linear"
    dropout: float = 0.0
    dora: bool = False

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parts(self) -> tuple[Factor, ...]:
        """The tensors that it has."""
        if self.kind == "saved":
            return ("weight",)
        return ("A", "B", "magnitude") if self.dora else ("A", "B")

    def shape_of(self, part: Factor) -> Shape:
        """The canonical shape of one of them: magnitudes are [out], of an embedding [hidden]."""
        if part == "weight":
            return self.shape
        if part == "magnitude":
            return self.shape_b[:-1]
        return self.shape_a if part == "A" else self.shape_b

    @property
    def shape_a(self) -> Shape:
        """Of A: [rank, in]; [experts, rank, in]; of an embedding [rank, rows]."""
        if self.kind == "embedding":
            return (self.rank, self.shape[0])
        return (*self.shape[:-2], self.rank, self.shape[-1])

    @property
    def shape_b(self) -> Shape:
        """Of B: [out, rank]; [experts, out, rank]; of an embedding [hidden, rank]."""
        if self.kind == "embedding":
            return (self.shape[1], self.rank)
        return (*self.shape[:-1], self.rank)


def spelled_out(spec: LoraSpec, targets: Sequence[Target]) -> LoraSpec:
    """A spec that means just these targets in a model that names its modules so, whatever `spec` called them."""
    adapted = [target for target in targets if target.kind != "saved"]
    common = {name: Counter(getattr(t, name) for t in adapted).most_common(1)[0][0] for name in ("rank", "alpha")}
    # PEFT has no dropout beside experts, and so it is the linears that are named.
    common["dropout"] = 0.0 if any(t.kind == "experts" for t in adapted) else spec.dropout

    def pattern(name: str) -> dict[str, Any]:
        return {re.escape(t.module): getattr(t, name) for t in adapted if getattr(t, name) != common[name]}

    return LoraSpec(
        rank=common["rank"],
        alpha=common["alpha"],
        targets=tuple(target.module for target in adapted if target.kind != "experts"),
        dropout=common["dropout"],
        parameters=tuple(target.module for target in adapted if target.kind == "experts"),
        rank_pattern=pattern("rank"),
        alpha_pattern=pattern("alpha"),
        rslora=spec.rslora,
        dora=spec.dora,
        modules_to_save=tuple(dict.fromkeys(t.module.rpartition(".")[0] for t in targets if t.kind == "saved")),
        dropout_pattern=pattern("dropout"),
    )


def endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: what a target may say to mean the module `a.b.c`."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _at_end(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _compiled(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"lora: {where}: {pattern!r} is not a regular expression ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
