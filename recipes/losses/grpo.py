"""Losses of answers that were sampled and rewarded, as functions of log-probabilities: GRPO and its kin.

Each gives a sum and what it is a mean over, so that the loss of a batch is the same however it was cut into
microbatches. Names and arguments are TRL's (1.16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# TRL's, against a group whose rewards are all the same.
_STD_EPS = 1e-4


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probabilities of the tokens of sampled answers, [n, t] each; `mask` bool [n, t] says where there are any.

    `logps`: under the policy, with a gradient; `old_logps`: under the policy that the ratio is to; `ref_logps`: under
    the reference, where there is one. `advantages` [n]. `importance` [n, t]: what the surrogate of each token is
    weighed with, where the sampler was not the old policy.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    importance: Tensor | None = None


def rows_of(answers: AnswerLogps, which: Tensor) -> AnswerLogps:
    """Some of the answers, by a mask: bool [n]."""
    parts = {each.name: getattr(answers, each.name) for each in fields(answers)}
    chosen: dict[str, Any] = {name: None if part is None else part[which] for name, part in parts.items()}
    return AnswerLogps(**chosen)


@dataclass(frozen=True)
class PolicyOptions:
    """Ratios are clipped to [1 - `epsilon`, 1 + `epsilon_high`]; `beta`: factor of the KL to the reference;
    `max_length`: the longest answer there may be, which Dr. GRPO divides by; tokens behind it would not count."""

    max_length: int
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0


# (the sum that is differentiated, what it is divided by): [] each.
Sum = tuple[Tensor, Tensor]
PolicyLoss = Callable[[AnswerLogps, PolicyOptions], Sum]


def token_ratios(answers: AnswerLogps) -> Tensor:
    """π / π_old of every token [n, t]."""
    return (answers.logps - answers.old_logps).exp()


def sequence_ratios(answers: AnswerLogps) -> Tensor:
    """(π / π_old)^(1 / tokens) of every answer, [n, 1] (GSPO, arXiv 2507.18071, eq. 7)."""
    differences = ((answers.logps - answers.old_logps) * answers.mask).sum(-1)
    return (differences / _lengths(answers)).exp()[:, None]


def clipped(ratios: Tensor, answers: AnswerLogps, options: PolicyOptions) -> Tensor:
    """Where the surrogate of `ratios` [n, t or 1] is held by its bound, and has no gradient; bool, of the same shape.

    Behind the mask it means nothing.
    """
    good = answers.advantages[:, None] > 0
    high = ratios > 1 + options.epsilon_high
    low = ratios < 1 - options.epsilon
    return (high & good) | (low & (answers.advantages[:, None] < 0))


def divergence(answers: AnswerLogps) -> Tensor:
    """An estimate of the KL to the reference from every token (k3, http://joschu.net/blog/kl-approx.html), [n, t]."""
    assert answers.ref_logps is not None
    away = answers.ref_logps - answers.logps
    return away.exp() - away - 1


def grpo(answers: AnswerLogps, options: PolicyOptions) -> Sum:
    """GRPO (arXiv 2402.03300): the mean over answers of the mean over their tokens."""
    return _of_answers(_token_losses(token_ratios(answers), answers, options), answers)


def gspo(answers: AnswerLogps, options: PolicyOptions) -> Sum:
    """GSPO (arXiv 2507.18071): one ratio for an answer."""
    return _of_answers(_token_losses(sequence_ratios(answers), answers, options), answers)


def dapo(answers: AnswerLogps, options: PolicyOptions) -> Sum:
    """DAPO (arXiv 2503.14476): the mean over all tokens; meant for an `epsilon_high` above `epsilon`."""
    losses = _token_losses(token_ratios(answers), answers, options)
    return (losses * answers.mask).sum(), answers.mask.sum()


def dr_grpo(answers: AnswerLogps, options: PolicyOptions) -> Sum:
    """Dr. GRPO (arXiv 2503.20783): a sum over tokens, divided by a constant, so that length has no weight."""
    losses = _token_losses(token_ratios(answers), answers, options)
    return (losses * answers.mask).sum() / options.max_length, _count(answers)


def rloo(answers: AnswerLogps, options: PolicyOptions) -> Sum:
    """RLOO (arXiv 2402.14740): REINFORCE of whole answers, clipped. Without a KL term: TRL's is part of the reward."""
    ratios = ((answers.logps - answers.old_logps) * answers.mask).sum(-1, keepdim=True).exp()
    surrogate = _surrogate(ratios, answers, options)[:, 0]
    if answers.importance is not None:
        surrogate = surrogate * (answers.importance.where(answers.mask, 1.0)).prod(-1)
    return surrogate.sum(), _count(answers)


LOSSES: Mapping[str, PolicyLoss] = MappingProxyType({loss.__name__: loss for loss in (grpo, dapo, dr_grpo, gspo, rloo)})


def group_advantages(rewards: Tensor, size: int, scale: str = "group") -> Tensor:
    """Advantages [n] of `rewards` [n], groups of `size` answers to one prompt; NaN: a row that has none, and gets 0.

    A reward less the mean of its group, over the standard deviation of the group, of all (`scale` "batch"), or as it is
    ("none", Dr. GRPO).
    """
    groups = rewards.reshape(-1, size)
    centred = groups - groups.nanmean(-1, keepdim=True)
    if scale == "group":
        centred = centred / (_std(groups) + _STD_EPS)
    elif scale == "batch":
        centred = centred / (_std(rewards[None]) + _STD_EPS)
    return centred.reshape(-1).nan_to_num(0.0)


def leave_one_out(rewards: Tensor, size: int) -> Tensor:
    """Advantages [n] of RLOO: a reward less the mean of the others of its group. NaN as in `group_advantages`."""
    groups = rewards.reshape(-1, size)
    others = (~groups.isnan()).sum(-1, keepdim=True) - 1
    baseline = (groups.nansum(-1, keepdim=True) - groups) / others
    return (groups - baseline).where(others > 0, 0.0).reshape(-1).nan_to_num(0.0)


def group_std(rewards: Tensor, size: int) -> Tensor:
    """The standard deviation of each row's group, [n] (unbiased; 0 of fewer than two rewards)."""
    return _std(rewards.reshape(-1, size)).expand(-1, size).reshape(-1)


def _std(rewards: Tensor) -> Tensor:
    """[groups, size] -> [groups, 1], over what is no NaN."""
    count = (~rewards.isnan()).sum(-1, keepdim=True)
    squares = (rewards - rewards.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _surrogate(ratios: Tensor, answers: AnswerLogps, options: PolicyOptions) -> Tensor:
    advantages = answers.advantages[:, None]
    bounded = ratios.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    return -torch.min(ratios * advantages, bounded * advantages)


def _token_losses(ratios: Tensor, answers: AnswerLogps, options: PolicyOptions) -> Tensor:
    """[n, t], or [n, 1] where the ratios are and nothing is added to them token by token."""
    losses = _surrogate(ratios, answers, options)
    if answers.importance is not None:
        losses = losses * answers.importance
    return losses + options.beta * divergence(answers) if options.beta else losses


def _of_answers(losses: Tensor, answers: AnswerLogps) -> Sum:
    return ((losses * answers.mask).sum(-1) / _lengths(answers)).sum(), _count(answers)


def _lengths(answers: AnswerLogps) -> Tensor:
    return answers.mask.sum(-1).clamp(min=1)


def _count(answers: AnswerLogps) -> Tensor:
    return answers.mask.new_full((), len(answers.mask), dtype=torch.int64)
