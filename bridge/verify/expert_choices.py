"""Experts as transformers chose them, for our routers too.

Which experts a token goes to is no continuous function: where the last one chosen and the first one left out are equal
but for rounding, two right models choose apart, and all that follows differs. So ours takes transformers' choice, and
what it would have chosen is held against that: where it differs, by how much the two experts' logits do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor, nn

# Of a provider's config: Megatron's own way to be told the choice.
OVERRIDES = {"moe_enable_routing_replay": True}


class Ties(NamedTuple):
    """Tokens that would have gone elsewhere, and the largest difference of two experts' logits between which that
    turned, relative to the token's largest."""

    tokens: int
    widest: float


def record_choices(layer: nn.Module, keep: Callable[[Tensor], None]) -> None:
    """Hand over what the router of a transformers layer chooses, [b * s, k], when it runs; no router, nothing."""
    for module in layer.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda module, args, output: keep(output[2].clone()))


class GivenChoices:
    """Of one router of a Megatron model on one rank: it takes `choices` [b * s, k] of the rows of `real` [b, s]."""

    def __init__(self, router: Any, choices: Tensor, real: Tensor) -> None:
        self._real = real.t().flatten()
        self._choices = choices.view(*real.shape, -1).transpose(0, 1).flatten(0, 1)
        self._seen: list[Ties] = []
        router.router_replay.set_target_indices(self._choices)
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        router.register_forward_hook(self._look)

    def last(self) -> Ties:
        """Of the last time that the router ran."""
        return self._seen[-1]

    def _look(self, router: Any, args: Any, output: Any) -> None:
        logits = router.gating(args[0])
        router.router_replay.clear_router_replay_action()
        own = router.routing(logits)[1][self._real].bool()
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        logits = logits.float().flatten(0, 1)[self._real]
        given = torch.zeros_like(own).scatter_(1, self._choices[self._real], True)
        apart = (own != given).any(-1)
        infinity = torch.full_like(logits, float("inf"))
        highest = torch.where(own & ~given, logits, -infinity).amax(-1)[apart]
        lowest = torch.where(given & ~own, logits, infinity).amin(-1)[apart]
        widths = (highest - lowest) / logits.abs().amax(-1)[apart]
        # Where one has chosen more than the other there is nothing to compare with.
        widths = widths.where(widths.isfinite(), infinity[apart, 0]).abs()
        self._seen.append(Ties(int(apart.sum()), widths.max().item() if len(widths) else 0.0))


def forget_routers() -> None:
    """Megatron lists every router that can be told a choice, for the life of the process; nothing here reads it."""
    RouterReplay.clear_global_router_replay_instances()
