"""What an objective needs before a step's gradients: log-probabilities under the reference, and means over the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.errors import TrainingError
from bridge.lora.inject import disabled
from recipes.config import Recipe
from recipes.losses.objective import Objective, PreferenceLoss, answer_logps
from recipes.losses.policy import PolicyLoss
from recipes.train.passes import Passed, Prepared, through
from recipes.train.setup import BuiltModel


def reference_of(recipe: Recipe) -> str:
    """Which model is the reference of a recipe with preferences: "base" or "start" (see `PreferenceConfig`)."""
    said, lora = recipe.preference.reference, recipe.lora
    if said != "auto":
        return said
    return "base" if lora.rank and lora.adapter is None and not lora.modules_to_save else "start"


def settled(
    run: BuiltModel, objective: Objective, microbatches: list[Prepared], train: bool
) -> tuple[Objective, list[Prepared]]:
    """The objective and the microbatches of a step with all that their losses need. Collective."""
    if objective.referenced and any("ref_logps" not in each.batch for each in microbatches):
        microbatches = _with_base(run, microbatches, objective)
    if isinstance(objective, PreferenceLoss) and objective.nll and train:
        objective = replace(objective, nll_scale=_nll_scale(objective, microbatches))
    return objective, microbatches


def log_probabilities(run: BuiltModel, microbatches: Sequence[Prepared], objective: Objective) -> list[Tensor]:
    """Of every microbatch's answers, float64 [answers], or of their tokens where the objective is of those, [b, s]; on
    ranks of the last stage, nothing elsewhere. Collective."""
    of = objective.logps if isinstance(objective, PolicyLoss) else answer_logps
    reports = through(run, microbatches, partial(_logps, of=of, cp=run.groups.cp), train=False)
    return [report["logps"] for report in reports]


def _logps(
    losses: Tensor, passed: Passed, of: Callable[..., Tensor], cp: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logps = of(losses, passed.batch, cp)
    return losses.sum(), torch.ones_like(passed.batch["labels"][0, 0]), {"logps": logps}


def _with_base(run: BuiltModel, microbatches: list[Prepared], objective: Objective) -> list[Prepared]:
    """With the log-probabilities of the model without its adapters: in the same weights, one more forward pass."""
    if reference_of(run.recipe) != "base":
        raise TrainingError("preference.reference=start: the data yields no ref_logps")
    run.gather_weights()
    with disabled(run.models):
        found = log_probabilities(run, microbatches, objective)
    if not found:
        return microbatches  # a stage that makes no losses
    return [
        each._replace(batch=each.batch | {"ref_logps": logps}) for each, logps in zip(microbatches, found, strict=True)
    ]


def _nll_scale(objective: PreferenceLoss, microbatches: Sequence[Prepared]) -> Tensor:
    """Pairs over tokens of a step, of all ranks: the likelihood's mean is over tokens, gradients are over pairs."""
    counts = [torch.stack([objective.count(each.batch), objective.nll_tokens(each.batch)]) for each in microbatches]
    total = torch.stack(counts).sum(0)
    dist.all_reduce(total)
    return total[0] / total[1]
