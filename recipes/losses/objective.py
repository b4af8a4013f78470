"""From the token losses of a microbatch to what a step minimises, and to the figures that are logged of it.

An objective is given the cross entropy of every token (`bridge.megatron.loss`), so that no logits are needed, and sums
it over answers where the loss is one of answers. A batch says which those are:

    sequence_ids        int64 [b, s]: where a label is of an answer, the answer's number in the microbatch; -1 elsewhere
    completion_lengths  int64 [answers]: how many labels each has
    desirable           int64 [answers]: 1 of those that are wanted (KTO)
    ref_logps           float64 [answers]: their log-probabilities under the reference

and where the data has several sources, the number of each label's and each answer's:

    source_ids          int64 [b, s]
    answer_sources      int64 [answers]

Answers 2i and 2i + 1 of a microbatch are the chosen and the rejected one of a pair. Under context parallelism every
rank has some tokens of each answer: sums are taken over the group, their gradient is every rank's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from bridge.megatron.context_parallel import take
from bridge.token_ids import IGNORE
from recipes.config import PreferenceConfig
from recipes.losses import names as known
from recipes.losses import preference
from recipes.losses.preference import PairLogps, PairLoss, PreferenceOptions

Batch = Mapping[str, Tensor]
# (the sum that is differentiated, float [], what it is divided by in the end, int [], and the sums of `names` of each
# source, float64 [sources, names])
Sums = tuple[Tensor, Tensor, Tensor]


class Objective(Protocol):
    """`counted`: what the loss is a mean over, as the log calls it. `names`: of the sums that `values` makes figures
    of; the first is the loss, the second the count. `referenced`: it needs `ref_logps`."""

    @property
    def counted(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def referenced(self) -> bool: ...

    def count(self, batch: Batch) -> Tensor:
        """What the loss of a microbatch (whole rows) is divided by, int64 []."""
        ...

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        """Of a microbatch's token losses [b, s / cp], float32, this rank's part of its rows."""
        ...

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures of `names` summed over ranks and microbatches: `loss` and what is logged beside it."""
        ...


def by_source(values: Tensor, ids: Tensor | None, sources: int) -> Tensor:
    """Sums of `values` over those of each source, float64 [sources]. `ids`: their sources, where there are several.

    Float64: the sum of a large batch's float32 losses would round more than a layout may change them.
    """
    if ids is None:
        return values.sum(dtype=torch.float64)[None]
    return values.new_zeros(sources, dtype=torch.float64).index_add(0, ids.flatten(), values.flatten().double())


def source_ids(batch: Batch, cp: dist.ProcessGroup) -> Tensor | None:
    """The source of every label of this rank's part of the rows; None where there is one source."""
    return take(batch["source_ids"], cp) if "source_ids" in batch else None


@dataclass(frozen=True)
class TokenLoss:
    """The mean cross entropy over tokens with a label."""

    counted: str = "supervised"
    names: tuple[str, ...] = ("loss", "supervised")
    referenced: bool = False

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        # The losses are of this rank's part of the rows, and what it counts must be of the same.
        tokens, ids = take(batch["labels"], cp) != IGNORE, source_ids(batch, cp)
        figures = [by_source(each, ids, sources) for each in (losses.detach(), tokens)]
        return losses.sum(), tokens.sum(), torch.stack(figures, 1)

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["supervised"]}


@dataclass(frozen=True)
class DraftedLoss(TokenLoss):
    """`TokenLoss` of a model, and that of its drafter's drafts: token losses are [2, b, s / cp], both are minimised."""

    names: tuple[str, ...] = ("loss", "supervised", "draft_loss")

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        model, drafts = losses
        total, tokens, figures = super().sums(model, batch, cp, sources)
        drafted = by_source(drafts.detach(), source_ids(batch, cp), sources)
        return total + drafts.sum(), tokens, torch.cat([figures, drafted[:, None]], 1)

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        return super().values(sums) | {"draft_loss": sums["draft_loss"] / sums["supervised"]}


def answer_logps(losses: Tensor, batch: Batch, cp: dist.ProcessGroup) -> Tensor:
    """The summed log-probabilities of a microbatch's answers, float64 [answers], whole on every rank of `cp`."""
    numbers = take(batch["sequence_ids"], cp).flatten()
    totals = losses.new_zeros(len(batch["completion_lengths"]) + 1, dtype=torch.float64)
    # What is of no answer comes first, and is left out.
    logps = totals.index_add(0, numbers + 1, -losses.flatten().double())[1:]
    return logps if cp.size() == 1 else reduce_from_tensor_model_parallel_region(logps, group=cp)


@dataclass(frozen=True)
class PreferenceLoss:
    """The weighted mean of `terms` over pairs, and `nll` times the mean cross entropy over tokens of chosen answers
    (with ORPO of their prompts too: wherever there is a label that is not of a rejected answer).

    `nll_scale`: pairs of a step over such tokens; without it the gradient of that term is none. `per_token`: rewards
    are of means over tokens.
    """

    terms: tuple[tuple[float, PairLoss], ...]
    options: PreferenceOptions
    nll: float = 0.0
    referenced: bool = True
    per_token: bool = False
    nll_scale: Tensor | None = None
    counted: str = "pairs"

    @property
    def names(self) -> tuple[str, ...]:
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
        return ("loss", "pairs", *rewards, *(("nll", "nll_tokens") if self.nll else ()))

    def count(self, batch: Batch) -> Tensor:
        lengths = batch["completion_lengths"]
        return lengths.new_full((), len(lengths) // 2)

    def nll_tokens(self, batch: Batch) -> Tensor:
        """How many labels of a microbatch (whole rows) the likelihood of chosen answers is of, int64 []."""
        return _of_chosen(batch["labels"], batch["sequence_ids"]).sum()

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        logps = answer_logps(losses, batch, cp)
        reference = batch["ref_logps"] if self.referenced else torch.zeros_like(logps)
        lengths = batch["completion_lengths"].double()
        pairs = PairLogps(*(each[half::2] for each in (logps, reference, lengths) for half in (0, 1)))
        of_pairs = sum((weight * term(pairs, self.options) for weight, term in self.terms), 0.0 * pairs.chosen)
        loss, count, ids = of_pairs.sum(), self.count(batch), batch.get("answer_sources")
        ids = None if ids is None else ids[::2]
        every = [of_pairs.detach(), torch.ones_like(of_pairs.detach()), *self._rewards(pairs)]
        figures = [by_source(each, ids, sources) for each in every]
        if cp.rank():
            # Pairs are whole on every rank of the group: the first one counts them.
            count, figures = torch.zeros_like(count), [torch.zeros_like(figure) for figure in figures]
        if self.nll:
            counts = _of_chosen(take(batch["labels"], cp), take(batch["sequence_ids"], cp))
            of_tokens = losses.where(counts, 0.0)
            figures += [by_source(each, source_ids(batch, cp), sources) for each in (of_tokens.detach(), counts)]
            if self.nll_scale is not None:
                loss = loss + self.nll * self.nll_scale * of_tokens.sum(dtype=torch.float64)
        return loss.float(), count, torch.stack(figures, 1)

    @torch.no_grad()
    def _rewards(self, pairs: PairLogps) -> list[Tensor]:
        chosen, rejected = pairs.chosen_ratios, pairs.rejected_ratios
        logps = (pairs.chosen, pairs.rejected)
        if self.per_token:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
            logps = (chosen, rejected)
        rewards = (self.options.beta * chosen, self.options.beta * rejected)
        return [*rewards, (chosen > rejected).double(), *logps]

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        pairs = sums["pairs"]
        figures = {name: sums[name] / pairs for name in self.names if "/" in name}
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        loss = sums["loss"] / pairs
        if self.nll:
            figures["nll_loss"] = sums["nll"] / sums["nll_tokens"]
            loss += self.nll * figures["nll_loss"]
        return {"loss": loss, **figures}


def _of_chosen(labels: Tensor, numbers: Tensor) -> Tensor:
    return (labels != IGNORE) & ((numbers < 0) | (numbers % 2 == 0))


@dataclass(frozen=True)
class AnswerLoss:
    """The mean of `answer_losses` over answers that are wanted or not. `kl` []: of the step (KTO)."""

    name: str
    options: PreferenceOptions
    kl: Tensor | None = None
    referenced: bool = True
    counted: str = "answers"

    @property
    def names(self) -> tuple[str, ...]:
        figures = tuple(f"{what}/{kind}" for kind in ("chosen", "rejected") for what in ("count", "rewards", "logps"))
        return ("loss", "answers", *figures, *(("kl",) if self.name == known.KTO else ()))

    def count(self, batch: Batch) -> Tensor:
        lengths = batch["completion_lengths"]
        return lengths.new_full((), len(lengths))

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        logps, desirable = answer_logps(losses, batch, cp), batch["desirable"].bool()
        ratios = logps - batch["ref_logps"]
        kl = ratios.new_zeros(()) if self.kl is None else self.kl
        of_answers, count = preference.answer_losses(self.name, ratios, desirable, kl, self.options), self.count(batch)
        every = [of_answers.detach(), torch.ones_like(ratios.detach())]
        with torch.no_grad():
            for of in (desirable, ~desirable):
                rewards = self.options.beta * ratios
                every += [of, rewards.where(of, 0.0), logps.where(of, 0.0)]
        if self.name == known.KTO:
            every.append(kl.expand_as(ratios))
        figures = [by_source(each, batch.get("answer_sources"), sources) for each in every]
        if cp.rank():
            count, figures = torch.zeros_like(count), [torch.zeros_like(figure) for figure in figures]
        return of_answers.sum().float(), count, torch.stack(figures, 1)

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = {"loss": sums["loss"] / sums["answers"]}
        for kind in ("chosen", "rejected"):
            if sums[f"count/{kind}"]:
                for what in ("rewards", "logps"):
                    found[f"{what}/{kind}"] = sums[f"{what}/{kind}"] / sums[f"count/{kind}"]
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found | {"kl": sums["kl"] / sums["answers"]} if "kl" in sums else found


def objective_of(config: PreferenceConfig) -> TokenLoss | PreferenceLoss | AnswerLoss:
    """What a recipe that has been checked minimises."""
    names = known.loss_names(config)
    options = PreferenceOptions(
        config.beta,
        config.label_smoothing,
        config.simpo_gamma,
        config.desirable_weight,
        config.undesirable_weight,
    )
    if not names:
        return TokenLoss()
    if names[0] in known.ANSWERS:
        return AnswerLoss(names[0], options)
    if names[0] in preference.UNREFERENCED:
        likelihood = {"orpo": 1.0, "cpo": config.cpo_alpha, "simpo": config.cpo_alpha}[names[0]]
        term = (1.0, preference.UNREFERENCED[names[0]])
        return PreferenceLoss((term,), options, likelihood, referenced=False, per_token=names[0] != "cpo")
    weights = config.loss_weights or [1.0] * len(names)
    weighted = dict(zip(names, weights, strict=True))
    terms = tuple((weight, preference.DPO[name]) for name, weight in weighted.items() if name != known.SFT)
    return PreferenceLoss(terms, options, weighted.get(known.SFT, 0.0))
