"""Losses of preferences, as functions of the log-probabilities of whole answers. Names are TRL's (1.16).

DPO's `loss_type`s, ORPO, CPO and SimPO compare a chosen with a rejected answer to one prompt; KTO and APO-zero
(unpaired) judge single answers. A loss is a float tensor [pairs], or [answers].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from recipes.losses.names import KTO


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of answers under the policy and the reference, and the answers' tokens; [pairs] each."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratios(self) -> Tensor:
        """log π / π_ref of the chosen answers."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratios(self) -> Tensor:
        """log π / π_ref of the rejected answers."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """By how much more the policy has moved towards the chosen answers."""
        return self.chosen_ratios - self.rejected_ratios

    @property
    def delta_per_token(self) -> Tensor:
        """The same, each answer's as a mean over its tokens."""
        return self.chosen_ratios / self.chosen_tokens - self.rejected_ratios / self.rejected_tokens


@dataclass(frozen=True)
class PreferenceOptions:
    """TRL's arguments of the same names. `beta` is τ of IPO; `simpo_gamma` of SimPO, the weights of KTO."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


PairLoss = Callable[[PairLogps, PreferenceOptions], Tensor]


def sigmoid(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """DPO (arXiv 2305.18290)."""
    return -logsigmoid(options.beta * pairs.delta)


def sigmoid_norm(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """DPO of means over tokens."""
    return -logsigmoid(options.beta * pairs.delta_per_token)


def hinge(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on DPO's reward."""
    return torch.relu(1 - options.beta * pairs.delta)


def ipo(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), of means over tokens."""
    return (pairs.delta_per_token - 1 / (2 * options.beta)) ** 2


def robust(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """Robust DPO (arXiv 2403.00409): preferences are wrong with probability `label_smoothing`."""
    flipped = options.label_smoothing
    logits = options.beta * pairs.delta
    return (flipped * logsigmoid(-logits) - (1 - flipped) * logsigmoid(logits)) / (1 - 2 * flipped)


def exo_pair(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): the reverse KL divergence to the preference, smoothed by `label_smoothing`."""
    logits = options.beta * pairs.delta
    smooth = logits.new_tensor(options.label_smoothing)
    won = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-smooth))
    return won + (-logits).sigmoid() * (logsigmoid(-logits) - smooth.log())


def nca_pair(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """NCA (arXiv 2402.05369)."""
    chosen, rejected = options.beta * pairs.chosen_ratios, options.beta * pairs.rejected_ratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """BCO (arXiv 2404.04656) of pairs, without its shift."""
    return -logsigmoid(options.beta * pairs.chosen_ratios) - logsigmoid(-options.beta * pairs.rejected_ratios)


def sppo_hard(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """SPPO (arXiv 2405.00675) where the chosen answer wins with probability 1."""
    half = 0.5 / options.beta
    return (pairs.chosen_ratios - half) ** 2 + (pairs.rejected_ratios + half) ** 2


def aot(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """AOT (arXiv 2406.05882): both distributions of log-ratios, each sorted, over the pairs given."""
    ours = (pairs.chosen - pairs.rejected).sort().values
    logits = options.beta * (ours - (pairs.ref_chosen - pairs.ref_rejected).sort().values)
    return _smoothed(logits, options.label_smoothing)


def apo_zero(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """APO (arXiv 2408.06266, eq. 7): chosen answers are better than the model's."""
    return 1 - (options.beta * pairs.chosen_ratios).sigmoid() + (options.beta * pairs.rejected_ratios).sigmoid()


def apo_down(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """APO (eq. 8): chosen answers are worse than the model's."""
    return (options.beta * pairs.chosen_ratios).sigmoid() + 1 - (options.beta * pairs.delta).sigmoid()


def orpo(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """The odds ratio's term of ORPO (arXiv 2403.07691, eq. 6), of means over tokens."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -options.beta * logsigmoid(chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected)))


def cpo(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """CPO (arXiv 2401.08417): DPO under a uniform reference."""
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


def simpo(pairs: PairLogps, options: PreferenceOptions) -> Tensor:
    """SimPO (arXiv 2405.14734): means over tokens, and a margin of `simpo_gamma`."""
    delta = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return _smoothed(options.beta * delta - options.simpo_gamma, options.label_smoothing)


# Without `sft`, which is a loss of tokens, not of pairs: the objective knows it.
DPO: Mapping[str, PairLoss] = MappingProxyType(
    {
        loss.__name__: loss
        for loss in (
            sigmoid,
            sigmoid_norm,
            ipo,
            hinge,
            robust,
            exo_pair,
            nca_pair,
            bco_pair,
            apo_zero,
            apo_down,
            aot,
            sppo_hard,
        )
    }
)
# Without a reference. ORPO, CPO and SimPO have the likelihood of the chosen answers beside them.
UNREFERENCED: Mapping[str, PairLoss] = MappingProxyType({loss.__name__: loss for loss in (orpo, cpo, simpo)})


def answer_losses(name: str, ratios: Tensor, desirable: Tensor, kl: Tensor, options: PreferenceOptions) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 7), or APO-zero of single answers: [answers], weighted.

    `ratios` [answers]: log π / π_ref; `desirable` [answers] bool; `kl` []: the estimate of the policy's divergence.
    """
    good = torch.where(desirable, 1.0, -1.0).to(ratios)
    weights = torch.where(desirable, options.desirable_weight, options.undesirable_weight).to(ratios)
    shift = kl if name == KTO else torch.zeros_like(kl)
    return weights * (1 - (options.beta * good * (ratios - shift)).sigmoid())


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -logsigmoid(logits) * (1 - smoothing) - logsigmoid(-logits) * smoothing


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation on either side of -log 2."""
    near = x > -0.6931471805599453
    return torch.where(near, (-torch.expm1(x.where(near, -0.1))).log(), torch.log1p(-x.where(~near, -1.0).exp()))
