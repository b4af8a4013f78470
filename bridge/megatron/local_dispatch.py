"""Tokens to experts and back where one rank holds all experts: a sort, two gathers, and no wait of the host.

Megatron's dispatchers read the counts of every layer on the host, which stops a GPU's queue of work once a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kernels import fused


class LocalDispatcher(MoETokenDispatcher):
    """For groups of one rank. Every token goes to exactly `moe_router_topk` experts."""

    def __init__(self, config: Gemma4TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self._topk: int = config.moe_router_topk
        self._kernels = config.kernels
        self._shape: torch.Size = torch.Size()
        self._places: tuple[Tensor, ...] = ()
        self.routing_map: Tensor | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[..., h], and [t, E] twice -> copies of the tokens [t * topk, h] sorted by expert, their probabilities."""
        self._shape, self.routing_map = tokens.shape, routing_map
        experts = routing_map.to(torch.float32).topk(self._topk).indices.flatten()
        # Stable: of one expert, the earlier token comes first.
        order = experts.argsort(stable=True)
        token = order // self._topk
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self._places = (token, back)
        sorted_probs = probs.flatten().index_select(0, token * probs.shape[1] + experts[order])
        return _Dispatch.apply(tokens.flatten(0, -2), token, back, self._topk, self._kernels), sorted_probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the tokens of each expert [E] between them."""
        assert self.routing_map is not None
        return hidden_states, self.routing_map.sum(0), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[t * topk, h] sorted by expert -> the sum of each token's, in the shape that came in."""
        combined: Tensor = _Combine.apply(hidden_states, *self._places, self._topk, self._kernels)
        # The next layer has its own: what is kept for the backward pass alone is let go of by it.
        self._places, self.routing_map = (), None
        return combined.view(self._shape)


def _combine(rows: Tensor, back: Tensor, topk: int, kernels: str) -> Tensor:
    """[t * topk, h] -> [t, h], a token's rows being those at `back`."""
    if fused(kernels, rows):
        from bridge.megatron.kernels import permute

        return permute.combine(rows, back, topk)
    return rows.index_select(0, back).unflatten(0, (-1, topk)).sum(1)


class _Dispatch(torch.autograd.Function):
    """Tokens to their copies. Gradients of a token's copies are gathered and summed: nothing is added atomically."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor, back: Tensor, topk: int, kernels: str) -> Tensor:
        ctx.save_for_backward(back)
        ctx.how = topk, kernels
        return tokens.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (back,) = ctx.saved_tensors
        return _combine(gradient, back, *ctx.how), None, None, None, None


class _Combine(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, token: Tensor, back: Tensor, topk: int, kernels: str) -> Tensor:
        ctx.save_for_backward(token)
        return _combine(copies, back, topk, kernels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (token,) = ctx.saved_tensors
        return gradient.index_select(0, token), None, None, None, None
