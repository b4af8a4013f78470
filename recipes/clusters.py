"""Layouts of a recipe for clusters that it names: with `cluster=8x141` its keys under `clusters: 8x141:` count too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from bridge.errors import UsageError

SELECTOR, SECTION = "cluster", "clusters"


def choose_cluster(
    said: Mapping[Any, Any], layouts: Mapping[str, Mapping[str, Any]], overrides: Sequence[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """A recipe with the keys of `layouts` (`clusters_of`) that `overrides` name and without the others; the other
    overrides.

    Raises UsageError, naming the clusters there are, where it is none of them.
    """
    recipe = {str(key): value for key, value in said.items() if key != SECTION}
    named = [one.partition("=")[2] for one in overrides if one.partition("=")[0] == SELECTOR]
    others = [one for one in overrides if one.partition("=")[0] != SELECTOR]
    if not named:
        return recipe, others
    if (name := named[-1]) not in layouts:
        known = f"it has {', '.join(layouts) or 'none'}"
        search = "gemma4-bridge plan RECIPE --gpus N --simulate looks for one"
        raise UsageError(f"{where}: no layout for {SELECTOR}={name} ({search}); {known}")
    chosen = OmegaConf.to_container(OmegaConf.merge(recipe, layouts[name]))
    assert isinstance(chosen, dict)
    return {str(key): value for key, value in chosen.items()}, others


def clusters_of(said: Mapping[Any, Any], where: str) -> dict[str, dict[str, Any]]:
    """What a recipe says of each cluster; nothing, where it is right as it is. Raises UsageError."""
    section = said.get(SECTION) or {}
    if not isinstance(section, Mapping):
        raise UsageError(f"{where}: {SECTION} is a mapping of clusters, each with keys of the recipe")
    for name, keys in section.items():
        if not isinstance(keys, Mapping | None):
            raise UsageError(f"{where}: {SECTION}.{name} is a mapping of keys of the recipe")
    return {str(name): dict(keys or {}) for name, keys in section.items()}
