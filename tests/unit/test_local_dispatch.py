"""The dispatcher of one rank against the dense sum that it stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.megatron.local_dispatch import LocalDispatcher


class One:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 4, 4), (17, 8, 3), (64, 128, 8)])
def test_tokens_go_to_their_experts_and_back(tokens: int, experts: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    scores[:, 0] = -1 if topk < experts else 1  # an expert without a token
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    routing_map.scatter_(1, scores.topk(topk).indices, True)
    probs = torch.where(routing_map, torch.rand(scores.shape, generator=generator, dtype=torch.float64), 0.0)
    probs[0] = 0.0  # a probability of zero is no reason to leave an expert out
    probs.requires_grad_()
    weights = torch.randn(experts, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    group: Any = One()
    config: Any = SimpleNamespace(moe_router_topk=topk)
    dispatcher = LocalDispatcher(config, SimpleNamespace(ep=group, expt_tp=group, tp_ep=group))  # type: ignore
    rows, chances = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing_map, probs))
    rows, counts, chances = dispatcher.dispatch_postprocess(rows, chances)
    assert counts.tolist() == routing_map.sum(0).tolist()
    by_expert = torch.repeat_interleave(torch.arange(experts), counts)
    # In the order of the tokens within each expert, as Megatron's dispatchers.
    wanted = torch.cat([hidden[routing_map[:, expert], 0] for expert in range(experts)])
    assert torch.equal(rows, wanted)
    made = rows * weights[by_expert] * chances[:, None]
    output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(made)))
    dense = torch.einsum("tbh,eh,te->tbh", hidden, weights, probs)
    assert output.shape == hidden.shape and torch.allclose(output, dense, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(output, (hidden, probs, weights), gradient)
    theirs = torch.autograd.grad(dense, (hidden, probs, weights), gradient)
    for a, b in zip(ours, theirs, strict=True):
        # The dense sum also has gradients of probabilities that stand for no route.
        b = b * routing_map if b.shape == probs.shape else b
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
