"""The objective of sampled and rewarded answers: `recipes.losses.grpo` on a microbatch, and the figures of the log.

A row of a microbatch is an answer behind its prompt. Beside what `recipes.losses.objective` says a batch has

    sampled_logps  float32 [b, s]: what the sampler said of a label; 0 where there is none
    advantages     float64 [answers]
    scores         float64 [answers, 3 + rewards]: the reward, the standard deviation of its group, whether the answer
                   was cut off, and each reward by itself; NaN where there is none
    ref_logps      float64 [b, s]: under the reference, where there is a KL to it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.config import GrpoConfig, Recipe
from recipes.losses.distill import distill_loss
from recipes.losses.grpo import (
    LOSSES,
    Answers,
    Options,
    clipped,
    divergence,
    rows_of,
    sequence_ratios,
    token_ratios,
)
from recipes.losses.objective import Batch, DraftedLoss, Objective, Sums, objective_of


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` by its name; `rewards` by theirs. `on_policy`: every rollout makes one step, so that the old policy is the
    policy itself, and what the sampler says differently is corrected for, up to `importance_cap` (0: not at all);
    otherwise the old policy is what the sampler said.
    """

    loss: str
    options: Options
    rewards: tuple[str, ...]
    on_policy: bool = True
    importance_cap: float = 0.0

    @property
    def referenced(self) -> bool:
        return bool(self.options.beta)

    @property
    def counted(self) -> str:
        return "supervised" if self.loss == "dapo" else "answers"

    @property
    def names(self) -> tuple[str, ...]:
        scores = (name for score in self._scores for name in (score, f"{score} count"))
        return ("loss", "count", "rows", "tokens", "clip_ratio", "mismatch", "kl", *scores)

    @property
    def _scores(self) -> tuple[str, ...]:
        return ("reward", "reward_std", "cut_off", *(f"reward/{name.replace(':', '.')}" for name in self.rewards))

    def count(self, batch: Batch) -> Tensor:
        mask = batch["sequence_ids"] >= 0
        return mask.sum() if self.loss == "dapo" else mask.any(-1).sum()

    def logps(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup) -> Tensor:
        """Of every label, float64 [b, s]."""
        return -losses.double()

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        answers = self._answers(losses, batch, cp)
        loss, count = LOSSES[self.loss](answers, self.options)
        sampled, scores, ids = batch["sampled_logps"], batch["scores"], batch.get("answer_sources")
        if ids is None:
            return loss.float(), count, self._figures(answers, sampled, scores)[None]
        own = [ids == source for source in range(sources)]
        figures = [self._figures(rows_of(answers, each), sampled[each], scores[each]) for each in own]
        return loss.float(), count, torch.stack(figures)

    @torch.no_grad()
    def _figures(self, answers: Answers, sampled: Tensor, scores: Tensor) -> Tensor:
        """The sums of `names`, float64."""
        loss, count = LOSSES[self.loss](answers, self.options)
        figures = [loss, count, count.new_full((), len(answers.mask)), answers.mask.sum()]
        ratios = (sequence_ratios if self.loss in ("gspo", "rloo") else token_ratios)(answers)
        mismatch = (answers.logps - sampled).abs()
        kl = divergence(answers) if self.referenced else torch.zeros_like(mismatch)
        held = clipped(ratios, answers, self.options).expand_as(answers.mask)
        figures += [each.where(answers.mask, 0).sum() for each in (held, mismatch, kl)]
        for score in scores.T:
            figures += [score.nansum(), (~score.isnan()).sum()]
        return torch.stack([figure.double() for figure in figures])

    def _answers(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup) -> Answers:
        logps, mask = self.logps(losses, batch, cp), batch["sequence_ids"] >= 0
        sampled = batch["sampled_logps"].double()
        importance = None
        if self.on_policy and self.importance_cap:
            importance = (logps.detach() - sampled).exp().clamp(max=self.importance_cap)
        return Answers(
            logps,
            logps.detach() if self.on_policy else sampled,
            batch["advantages"],
            mask,
            batch.get("ref_logps"),
            importance,
        )

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = {"loss": sums["loss"] / sums["count"]}
        for score in self._scores:
            if sums[f"{score} count"]:
                found[score] = sums[score] / sums[f"{score} count"]
        found["reward_failures"] = sums["rows"] - sums["reward count"]
        found["completion_length"] = sums["tokens"] / sums["rows"]
        for name in ("clip_ratio", "mismatch", *(("kl",) if self.referenced else ())):
            found[name] = sums[name] / sums["tokens"]
        return found


def policy_loss(config: GrpoConfig) -> PolicyLoss:
    """What a recipe that has been checked minimises."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    options = Options(config.epsilon, high, config.beta, config.max_new_tokens)
    return PolicyLoss(config.loss, options, tuple(config.rewards), config.updates == 1, config.importance_cap)


def training_objective(recipe: Recipe) -> Objective:
    """What the steps of a recipe that has been checked minimise."""
    return policy_loss(recipe.grpo) if recipe.grpo.rewards else evaluated_objective(recipe)


def evaluated_objective(recipe: Recipe) -> Objective:
    """What evaluations measure, which are of answers that are there."""
    if recipe.drafter.path is not None and recipe.drafter.target == "trained":
        return DraftedLoss()
    return objective_of(recipe.preference) if recipe.distill.teacher is None else distill_loss(recipe.distill)
