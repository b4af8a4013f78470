"""Log-probabilities that losses of preferences are compared on: random ones, of answers of unequal lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ANSWERS, LENGTH = 12, 20


@dataclass(frozen=True)
class Case:
    """`said`: keys of `preference`. `kl`: of KTO."""

    said: dict[str, Any] = field(default_factory=dict)
    kl: float | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        named = self.said["loss"]
        return (named,) if isinstance(named, str) else tuple(named)

    def reference(self) -> Tensor:
        """float32 [ANSWERS]: near the policy's, on both sides of it."""
        generator = torch.Generator().manual_seed(7)
        policy = -(token_losses(self) * mask()).sum(1)
        return policy + 6 * torch.randn(ANSWERS, generator=generator)


def _plain(loss: str, **said: Any) -> Case:
    return Case({"loss": loss, **said})


CASES = {
    "sigmoid": _plain("sigmoid"),
    "sigmoid, beta 0.5": _plain("sigmoid", beta=0.5),
    "sigmoid_norm": _plain("sigmoid_norm", beta=2.0),
    "ipo": _plain("ipo"),
    "hinge": _plain("hinge"),
    "robust": _plain("robust", label_smoothing=0.1),
    "exo_pair": _plain("exo_pair", label_smoothing=1e-3),
    "nca_pair": _plain("nca_pair"),
    "bco_pair": _plain("bco_pair"),
    "apo_zero": _plain("apo_zero"),
    "apo_down": _plain("apo_down"),
    "aot": _plain("aot", label_smoothing=0.05),
    "sppo_hard": _plain("sppo_hard"),
    "sft": _plain("sft"),
    "mpo": Case({"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]}),
    "orpo": _plain("orpo"),
    "cpo": _plain("cpo", label_smoothing=0.1),
    "simpo": _plain("simpo", cpo_alpha=0.0, beta=2.0),
    "simpo and likelihood": _plain("simpo", cpo_alpha=0.7, simpo_gamma=0.3),
    "kto": Case({"loss": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.8}, kl=1.7),
    "apo_zero_unpaired": _plain("apo_zero_unpaired"),
}


def lengths() -> Tensor:
    """Labels of each answer, int64 [ANSWERS]."""
    return torch.tensor([3 + 7 * number % 16 for number in range(ANSWERS)])


def mask() -> Tensor:
    """Where a label is of an answer: bool [ANSWERS, LENGTH]."""
    return (torch.arange(LENGTH) >= 2) & (torch.arange(LENGTH) < 2 + lengths()[:, None])


def desirable() -> Tensor:
    """bool [ANSWERS]"""
    return torch.arange(ANSWERS) % 3 != 1


def token_losses(case: Case) -> Tensor:
    """float32 [ANSWERS, LENGTH], of prompts too."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(ANSWERS, LENGTH, generator=generator) * 4 + 0.05


def labels(case: Case) -> Tensor:
    """int64 [ANSWERS, LENGTH]: of the answers; ORPO has the prompts of chosen ones besides."""
    labelled = mask()
    if case.losses == ("orpo",):
        labelled = labelled | ((torch.arange(ANSWERS) % 2 == 0)[:, None] & (torch.arange(LENGTH) < 2))
    return torch.where(labelled, 5, -100)


def batch_of(case: Case) -> dict[str, Tensor]:
    """As the data yields it: a chosen and a rejected answer in turn."""
    return {
        "labels": labels(case),
        "sequence_ids": torch.where(mask(), torch.arange(ANSWERS)[:, None], -1),
        "completion_lengths": lengths(),
        "desirable": desirable().long(),
    }
