"""Core attention: softmax(q k^T) v under a description of what is visible. Backends do the work."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.megatron.attention_backends import select
from bridge.megatron.exchange import exchange_of
from bridge.megatron.mask import mask_of
from bridge.megatron.visibility import MaskRule, Visibility


class CoreAttention(torch.nn.Module):
    """The module Megatron's attention holds. It has no parameters; `rule` is the layer's own.

    Under context parallelism it is where keys and values of other ranks come in: inside of what selective recompute
    repeats, so that they are not kept for the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rule: MaskRule,
        backend: str,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.backend = backend
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """This rank's [s / cp, b, heads, d] and [s / cp, b, groups, d] twice -> [s / cp, b, heads * d]."""
        if visibility.zigzag is not None:
            both = exchange_of(visibility, self.rule).fetch(torch.cat([key, value], dim=-1), self.cp_group)
            key, value = both.chunk(2, dim=-1)
        mask = mask_of(visibility, self.rule)
        return select(self.backend, query, key, mask).attend(query, key, value, mask).flatten(2)
