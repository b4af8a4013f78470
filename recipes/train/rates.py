"""Learning rates by group: a factor for each of Megatron's parameter groups, and a schedule that heeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor

from recipes.config import Recipe
from recipes.groups import RATED, compiled, none_named
from recipes.train.names import named_parameters

KEY = "optimizer.lr_groups"
# Megatron's own field of a parameter group, which its schedule does not read.
_FACTOR = "lr_mult"


class Schedule(OptimizerParamScheduler):
    """Megatron's, of which groups have their multiples: warm-up, decay and the last rate alike."""

    def get_lr(self, param_group: dict) -> float:
        return float(super().get_lr({})) * float(param_group.get(_FACTOR, 1.0))


def factors(recipe: Recipe) -> dict[str, float]:
    """Of the rate `optimizer.lr`, by the names of groups."""
    return {name: rate / recipe.optimizer.lr for name, rate in recipe.optimizer.lr_groups.items()}


def group_overrides(
    recipe: Recipe, config: OptimizerConfig, chunks: Sequence[torch.nn.Module]
) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's usual ones, and those of `optimizer.lr_groups`: of several that match the one that is named last.

    Collective. Raises UsageError for a group that no rank trains a parameter of.
    """
    overrides: dict[ParamKey, ParamGroupOverride] = get_standard_config_overrides(config)
    named = factors(recipe)
    if not named:
        return overrides
    patterns = compiled(KEY, list(named), RATED)

    names: dict[Tensor, str] = {parameter: name for chunk in chunks for name, parameter in named_parameters(chunk)}

    def groups_of(parameter: Tensor, name: str) -> list[int]:
        """The places of the groups that a parameter is in."""
        # Of tied embeddings the last stage has a copy, which must go the same way.
        shared = getattr(parameter, "shared_embedding", False)
        name = "embedding.word_embeddings.weight" if shared else names.get(parameter, name)
        return [place for place, pattern in enumerate(patterns) if pattern.search(name)]

    held = torch.zeros(len(patterns), dtype=torch.int64)
    for parameter, name in names.items():
        if parameter.requires_grad:
            held[groups_of(parameter, name)] += 1
    held = held.to(torch.cuda.current_device())
    dist.all_reduce(held)
    for name, count in zip(named, held.tolist(), strict=True):
        if not count:
            raise none_named(KEY, name, RATED)
    for place, (name, factor) in enumerate(named.items()):
        of_group = ParamWithNamePredicate(name, partial(_is_last, groups_of, place))
        overrides[ParamKey(with_name_predicate=of_group)] = {_FACTOR: factor}
    return overrides


def _is_last(groups_of: Callable[[Tensor, str], list[int]], place: int, parameter: Tensor, name: str) -> bool:
    return max(groups_of(parameter, name), default=-1) == place
