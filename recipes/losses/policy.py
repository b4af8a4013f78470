"""The objective of sampled and rewarded answers: `recipes.losses.grpo` on a microbatch, and the figures of the log.

An answer stands behind its prompt, in a row of its own or packed. Beside what `recipes.losses.objective` says a batch
has

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

from bridge.megatron.context_parallel import gather_alike
from recipes.config import GrpoConfig, Recipe
from recipes.losses.distill import distill_loss
from recipes.losses.grpo import (
    LOSSES,
    AnswerLogps,
    PolicyOptions,
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
    options: PolicyOptions
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
        lengths = batch["completion_lengths"]
        return lengths.sum() if self.loss == "dapo" else lengths.new_full((), len(lengths))

    def logps(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup) -> Tensor:
        """Of every label, float64 [b, s]: of the whole rows, on every rank of `cp`."""
        return -gather_alike(losses, cp).double()

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        answers, sampled = self._answers(losses, batch, cp)
        loss, count = LOSSES[self.loss](answers, self.options)
        scores, ids = batch["scores"], batch.get("answer_sources")
        if ids is None:
            figures = self._figures(answers, sampled, scores)[None]
        else:
            from_source = [ids == source for source in range(sources)]
            figures = torch.stack(
                [self._figures(rows_of(answers, each), sampled[each], scores[each]) for each in from_source]
            )
        if cp.rank():
            # Answers are whole on every rank of the group: the first one counts them.
            count, figures = torch.zeros_like(count), torch.zeros_like(figures)
        return loss.float(), count, figures

    @torch.no_grad()
    def _figures(self, answers: AnswerLogps, sampled: Tensor, scores: Tensor) -> Tensor:
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

    def _answers(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup) -> tuple[AnswerLogps, Tensor]:
        """The answers of a microbatch, and what the sampler said of them: [answers, `options.max_length`] each."""
        places, mask = answer_places(batch["sequence_ids"], batch["completion_lengths"], self.options.max_length)

        def of_answers(each: Tensor) -> Tensor:
            return each.flatten()[places].where(mask, 0.0)

        logps, sampled = of_answers(self.logps(losses, batch, cp)), of_answers(batch["sampled_logps"].double())
        importance = None
        if self.on_policy and self.importance_cap:
            importance = (logps.detach() - sampled).exp().clamp(max=self.importance_cap)
        reference = of_answers(batch["ref_logps"]) if self.referenced else None
        old = logps.detach() if self.on_policy else sampled
        return AnswerLogps(logps, old, batch["advantages"], mask, reference, importance), sampled

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


def answer_places(numbers: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where in the rows of a microbatch, laid end to end, the labels of each answer stand, int64 [answers, longest],
    and which of those there are, bool. `numbers`: `sequence_ids` [b, s], `lengths`: `completion_lengths` [answers]."""
    flat = numbers.flatten()
    places = torch.arange(len(flat), device=flat.device)
    # What is of no answer comes first, and is left out.
    first = places.new_full((len(lengths) + 1,), len(flat)).scatter_reduce(0, flat + 1, places, "amin")[1:]
    offsets = torch.arange(longest, device=flat.device)
    return (first[:, None] + offsets).clamp(max=len(flat) - 1), offsets < lengths[:, None]


def policy_loss(config: GrpoConfig) -> PolicyLoss:
    """What a recipe that has been checked minimises."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    options = PolicyOptions(config.max_new_tokens, config.epsilon, high, config.beta)
    return PolicyLoss(config.loss, options, tuple(config.rewards), config.updates == 1, config.importance_cap)


def training_objective(recipe: Recipe) -> Objective:
    """What the steps of a recipe that has been checked minimise."""
    return policy_loss(recipe.grpo) if recipe.grpo.rewards else evaluated_objective(recipe)


def evaluated_objective(recipe: Recipe) -> Objective:
    """What evaluations measure, which are of answers that are there."""
    if recipe.drafter.path is not None and recipe.drafter.target == "trained":
        return DraftedLoss()
    return objective_of(recipe.preference) if recipe.distill.teacher is None else distill_loss(recipe.distill)
