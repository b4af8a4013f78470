"""The token dispatcher where every rank has all experts: nothing is sent, and nobody waits for the device.

Megatron's alltoall dispatcher copies the number of tokens of each expert to the host, waits for it, and with it cuts
the tokens into chunks and puts them together again, twice in each direction; with one rank they are in order already.
Here all shapes are known beforehand: a token goes to `moe_router_topk` experts, none is dropped. The order is the same,
by expert and then by token, and so are sums in torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kernels import fused


class Order(NamedTuple):
    """How copies of tokens are ordered by expert.

    `experts` [t, k] are those of each token, ascending; its copies go to `places` [t, k]; row i is a copy of token
    `source[i]`, the `chosen[i]`th of all (token, expert) pairs. `counts` [E] are the rows of each expert. All int64.
    """

    experts: Tensor
    places: Tensor
    source: Tensor
    chosen: Tensor
    counts: Tensor


def order_of(routing_map: Tensor, topk: int) -> Order:
    """Of `routing_map` [t, E] bool, with `topk` experts in every row. No host sync."""
    experts = routing_map.to(torch.int8).topk(topk, dim=-1).indices.sort(dim=-1).values
    seen = routing_map.cumsum(0)  # of each expert, up to and with each token
    counts = routing_map.sum(0)
    places = (seen - 1 + counts.cumsum(0) - counts).gather(1, experts)
    pairs = torch.arange(experts.numel(), device=experts.device)
    chosen = torch.empty_like(pairs).scatter_(0, places.flatten(), pairs)
    return Order(experts, places, chosen // topk, chosen, counts)


def spread(tokens: Tensor, order: Order, kernels: str) -> Tensor:
    """[t, h] -> [t * k, h], by expert."""
    if fused(kernels, tokens):
        from bridge.megatron.kernels import permute

        return permute.spread(tokens, order.source, order.places)
    return tokens.index_select(0, order.source)


def collect(rows: Tensor, order: Order, kernels: str) -> Tensor:
    """[t * k, h] -> [t, h]: the sum of what the experts of a token say."""
    if fused(kernels, rows):
        from bridge.megatron.kernels import permute

        return permute.collect(rows, order.source, order.places)
    return rows.new_zeros(len(order.places), rows.shape[1]).index_add(0, order.source, rows)


class LocalDispatcher(MoETokenDispatcher):
    """For expert parallelism and expert tensor parallelism of 1, without capacities."""

    config: Gemma4TransformerConfig

    def __init__(self, config: Gemma4TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.order: Order | None = None
        self.shape = torch.Size()

    @staticmethod
    def serves(config: Gemma4TransformerConfig, pg_collection: ProcessGroupCollection) -> bool:
        """Whether it can stand for the dispatcher that `config` asks for."""
        alone = pg_collection.ep.size() == pg_collection.expt_tp.size() == 1
        exact = config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization
        return alone and exact and config.moe_token_dispatcher_type == "alltoall"

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h], [t, E] and [t, E] -> rows by expert [t * k, h], and their probabilities [t * k]."""
        self.shape = tokens.shape
        order = self.order = order_of(routing_map, self.config.moe_router_topk)
        chosen = probs.gather(1, order.experts).flatten().index_select(0, order.chosen)
        return spread(tokens.flatten(0, -2), order, self.config.kernels), chosen

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with the rows of each expert [E], on the device, between them."""
        assert self.order is not None
        return hidden_states, self.order.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[t * k, h] -> [s, b, h]."""
        assert self.order is not None
        output = collect(hidden_states, self.order, self.config.kernels).view(self.shape)
        self.order = None
        return output
