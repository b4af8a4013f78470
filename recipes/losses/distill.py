"""The objective of a student: the token losses of `bridge.megatron.distillation`, and the figures of the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.megatron.context_parallel import take
from bridge.megatron.distillation import Distillation
from bridge.token_ids import IGNORE
from recipes.config import DistillConfig
from recipes.losses.objective import Batch, Sums, by_source, source_ids


@dataclass(frozen=True)
class DistillLoss:
    """The mean over tokens with a label. Its `losses` are [b, s / cp, 2]: what is minimised, and the cross entropy.

    `top_k`: of the teacher's tokens, 0: all. `on_policy`: some answers are the model's: they have
    `sequence_ids`.
    """

    asked: Distillation
    top_k: int = 0
    on_policy: bool = False
    counted: str = "supervised"
    names: tuple[str, ...] = ("loss", "supervised", "cross_entropy", "on_policy")
    referenced: bool = False

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def sums(self, losses: Tensor, batch: Batch, cp: dist.ProcessGroup, sources: int = 1) -> Sums:
        tokens, ids = take(batch["labels"], cp) != IGNORE, source_ids(batch, cp)
        loss, entropy = losses.detach().unbind(-1)
        on_policy = tokens if "sequence_ids" in batch else torch.zeros_like(tokens)
        figures = [by_source(each, ids, sources) for each in (loss, tokens, entropy, on_policy)]
        return losses[..., 0].sum(), tokens.sum(), torch.stack(figures, 1)

    def values(self, sums: Mapping[str, float]) -> dict[str, float]:
        tokens = sums["supervised"]
        loss, entropy = sums["loss"] / tokens, sums["cross_entropy"] / tokens
        figures = {"loss": loss, "divergence": loss - self.asked.cross_entropy * entropy, "cross_entropy": entropy}
        return figures | {"on_policy": sums["on_policy"] / tokens} if self.on_policy else figures


def distill_loss(config: DistillConfig) -> DistillLoss:
    """What a recipe that has been checked minimises."""
    asked = Distillation(config.beta, config.temperature, config.cross_entropy)
    return DistillLoss(asked, config.top_k, bool(config.lmbda))
