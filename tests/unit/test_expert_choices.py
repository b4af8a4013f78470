"""What a router would have chosen, held against the choice that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from bridge.verify.expert_choices import GivenChoices, forget_routers

LOGITS = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]], [[4.0, 2.0, 2.0 + 2e-6, 1.0]]])


class Router(torch.nn.Module):
    """Logits that are given, [s, 1, E], and a rule of choice."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.router_replay = rule, RouterReplay()

    def gating(self, input: Tensor) -> Tensor:
        return input

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        flat = logits.flatten(0, 1)
        return flat, torch.zeros_like(flat, dtype=torch.bool).scatter_(1, self.rule(flat), True)

    def forward(self, input: Tensor) -> Any:
        return self.routing(self.gating(input))


def largest(count: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.topk(count, dim=-1).indices


@pytest.mark.parametrize(
    ("rule", "tokens", "widest"),
    [
        (largest(2), 1, 5e-7),  # the third token's tie
        (lambda logits: logits.topk(2, largest=False, dim=-1).indices, 3, 0.75),
        (largest(3), 3, float("inf")),
        (largest(1), 3, float("inf")),
    ],
)
def test_a_rule_of_choice(rule: Callable[[Tensor], Tensor], tokens: int, widest: float) -> None:
    """A tie is told by its width; a rule that is not the k largest is far from one."""
    router = Router(rule)
    given = GivenChoices(router, torch.tensor([[0, 1], [3, 2], [0, 1]]), torch.ones(1, 3, dtype=torch.bool))
    router(LOGITS)
    forget_routers()
    assert given.last().tokens == tokens
    assert given.last().widest == pytest.approx(widest, rel=0.1)


def test_padding_is_not_counted() -> None:
    router = Router(largest(2))
    given = GivenChoices(router, torch.tensor([[0, 1], [3, 2], [0, 1]]), torch.tensor([[True, True, False]]))
    router(LOGITS)
    forget_routers()
    assert given.last() == (0, 0.0) and not RouterReplay.global_router_replay_instances
