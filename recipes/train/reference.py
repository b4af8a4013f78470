"""What an objective needs before a step's gradients: log-probabilities under the reference, and means over the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.errors import TrainingError
from bridge.lora.inject import disabled
from recipes.config import Recipe
from recipes.losses.distill import DistillLoss
from recipes.losses.names import KTO
from recipes.losses.objective import AnswerLoss, Objective, PreferenceLoss, answer_logps
from recipes.losses.policy import PolicyLoss
from recipes.train.passes import Batch, Passed, Prepared, mismatched_rows, prepare, through
from recipes.train.setup import BuiltModel
from recipes.train.teacher import taught

# (token losses, their microbatch, context-parallel ranks) -> log-probabilities
LogProbabilities = Callable[[Tensor, Mapping[str, Tensor], dist.ProcessGroup], Tensor]


def reference_of(recipe: Recipe) -> str:
    """Which model is the reference of a recipe with preferences: "base" or "start" (see `PreferenceConfig`)."""
    said, lora = recipe.preference.reference, recipe.lora
    if said != "auto":
        return said
    return "base" if lora.rank and lora.adapter is None and not lora.modules_to_save else "start"


def settled(
    run: BuiltModel, objective: Objective, batches: Sequence[Batch], train: bool
) -> tuple[Objective, list[Prepared]]:
    """The objective and the microbatches of a step with all that their losses need. Collective."""
    if isinstance(objective, AnswerLoss) and objective.name == KTO and objective.kl is None:
        objective = replace(objective, kl=divergence(run, [batches]))
    microbatches = _prepared(run, batches)
    if isinstance(objective, DistillLoss):
        microbatches = taught(run, objective, batches, microbatches)
    if objective.referenced and any("ref_logps" not in each.batch for each in microbatches):
        of = objective.logps if isinstance(objective, PolicyLoss) else answer_logps
        microbatches = _with_base(run, microbatches, of)
    if isinstance(objective, PreferenceLoss) and objective.nll and train:
        objective = replace(objective, nll_scale=_nll_scale(objective, microbatches))
    return objective, microbatches


def divergence(run: BuiltModel, groups: Iterable[Sequence[Batch]]) -> Tensor:
    """KTO's estimate of how far the policy is from the reference, float64 [], alike on every rank: the mean of
    log π / π_ref of answers behind other prompts than theirs, at least 0. Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batches in groups:
        microbatches = _prepared(run, [mismatched_rows(batch) for batch in batches])
        policy = log_probabilities(run, microbatches)
        if any("ref_logps" not in each.batch for each in microbatches):
            microbatches = _with_base(run, microbatches)
        if run.groups.tp.rank() or run.groups.cp.rank():
            continue  # others have the same
        for each, logps in zip(microbatches, policy, strict=True) if policy else ():
            total += torch.stack([(logps - each.batch["ref_logps"]).sum(), logps.new_tensor(len(logps))])
    dist.all_reduce(total)
    return (total[0] / total[1]).clamp(min=0)


def _prepared(run: BuiltModel, batches: Sequence[Batch]) -> list[Prepared]:
    return [prepare(batch, run, run.recipe.train.seq_length) for batch in batches]


def log_probabilities(
    run: BuiltModel, microbatches: Sequence[Prepared], of: LogProbabilities = answer_logps
) -> list[Tensor]:
    """Of every microbatch's answers, float64 [answers], or what `of` makes of its token losses; on ranks of the last
    stage, nothing elsewhere. Collective."""
    reports = through(run, microbatches, partial(_logps, of=of, cp=run.groups.cp), train=False)
    return [report["logps"] for report in reports]


def _logps(
    losses: Tensor, passed: Passed, of: LogProbabilities, cp: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logps = of(losses, passed.batch, cp)
    return losses.sum(), torch.ones_like(passed.batch["labels"][0, 0]), {"logps": logps}


def _with_base(run: BuiltModel, microbatches: list[Prepared], of: LogProbabilities = answer_logps) -> list[Prepared]:
    """With the log-probabilities of the model without its adapters: in the same weights, one more forward pass."""
    if reference_of(run.recipe) != "base":
        raise TrainingError("preference.reference=start: the data yields no ref_logps")
    run.gather_weights()
    with disabled(run.models):
        found = log_probabilities(run, microbatches, of)
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
