"""The keys of `data.sources`: what cannot be is refused, by the source and the key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.errors import UsageError
from recipes.config import DataConfig, Recipe, SourceConfig


def paths(value: Any) -> tuple[str, ...]:
    """The names in `data.path`, of a source, or in one set of `data.eval`."""
    return tuple(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else (str(value),)


def name_of(said: SourceConfig) -> str:
    """Its own, or that of its first file or dataset, without endings."""
    if said.name is not None:
        return str(said.name)
    return Path(paths(said.path)[0]).name.partition(".")[0] if said.path else ""


def left_out(data: DataConfig) -> list[str]:
    """The names of sources of weight 0."""
    return [name_of(said) for said in data.sources if said.weight == 0]


def all_paths(data: DataConfig) -> tuple[str, ...]:
    """Everything that is trained on, by the names it is given."""
    return tuple(path for said in data.sources for path in paths(said.path)) if data.sources else paths(data.path)


def check_sources(recipe: Recipe) -> None:
    """Raise UsageError that names the source and the key of what cannot be."""
    data = recipe.data
    if not data.sources:
        return
    if data.path is not None:
        raise UsageError("data.path and data.sources: set one of them; data.path is a single source")
    names: dict[str, int] = {}
    for number, said in enumerate(data.sources):
        at = f"data.sources[{number}]"
        if not said.path:
            raise UsageError(f"{at}: path is not set")
        name = name_of(said)
        if not name or "/" in name:
            raise UsageError(f"{at}.name={name}: is what the log calls it, loss/NAME; a name has no slashes")
        if name in names:
            raise UsageError(f"{at}: is called {name}, as data.sources[{names[name]}] is; set its name")
        names[name] = number
        _check_numbers(said, f"{at} ({name})")
    _check_weights(recipe)


def _check_numbers(said: SourceConfig, at: str) -> None:
    for key, value, least in (
        ("tokens", said.tokens, 1),
        ("max_samples", said.max_samples, 0),
        ("repeat", said.repeat, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{at}: {key}={value}: must be at least {least}")
    if said.weight is None:
        return
    if not 0 <= said.weight < float("inf"):
        raise UsageError(f"{at}: weight={said.weight}: must be a number of at least 0")
    for key, given in (("tokens", said.tokens is not None), ("repeat", said.repeat != 1)):
        if given:
            raise UsageError(f"{at}: {key} and weight both say how much is taken of it; leave one out")


def _check_weights(recipe: Recipe) -> None:
    """Weights are parts of a whole, which has no end of its own."""
    sources = recipe.data.sources
    without = [number for number, said in enumerate(sources) if said.weight is None]
    if len(without) == len(sources):
        return
    if without:
        at = f"data.sources[{without[0]}] ({name_of(sources[without[0]])})"
        raise UsageError(f"{at}: has no weight, and others have; give every source one, or none")
    if not any(said.weight for said in sources):
        raise UsageError("data.sources: every weight is 0, which leaves nothing to train on")
    if len(sources) == 1:
        raise UsageError("data.sources[0]: a weight has no meaning for the only source; leave it out")
    if recipe.train.epochs:
        raise UsageError(
            f"train.epochs={recipe.train.epochs:g}: has no meaning where data.sources have weights, by which some are "
            "seen more often than others; set train.steps, or tokens and repeat in the place of weight"
        )
