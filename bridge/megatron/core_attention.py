"""Core attention: softmax(q k^T) v under a description of what is visible. Backends do the work."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.megatron.attention_backends import select
from bridge.megatron.exchange import exchange_of
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.mask import mask_of
from bridge.megatron.visibility import MaskRule, Visibility

# Of how many pieces an exchange is at most: the first one's way is not hidden, and small products are slow.
_PIECES = 4


class CoreAttention(torch.nn.Module):
    """The module Megatron's attention holds. It has no parameters; `rule` is the layer's own.

    `source`: the layer whose keys and values it reads, which names their cache in generation.

    Under context parallelism it is where keys and values of other ranks come in: inside of what selective recompute
    repeats, so that they are not kept for the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rule: MaskRule,
        backend: str,
        source: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.backend = backend
        self.source = source
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility | CachedStep) -> Tensor:
        """This rank's [s / cp, b, heads, d] and [s / cp, b, groups, d] twice -> [s / cp, b, heads * d]."""
        if isinstance(visibility, CachedStep):
            return visibility.attend(self.source, self.rule, self.backend, query, key, value).flatten(2)
        if visibility.zigzag is None:
            return self._attend(query, key, value, visibility).flatten(2)
        # In pieces of a few query groups: one is computed while the next is on its way.
        pieces = math.gcd(key.shape[2], _PIECES)
        exchange = exchange_of(visibility, self.rule)
        both = torch.cat([key, value], dim=-1).chunk(pieces, dim=2)
        exchanges = [exchange.start(piece, self.cp_group) for piece in both]
        outputs = []
        for part, rows in zip(query.chunk(pieces, dim=2), exchanges, strict=True):
            key, value = rows.wait().chunk(2, dim=-1)
            outputs.append(self._attend(part, key, value, visibility))
        return torch.cat(outputs, dim=2).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        mask = mask_of(visibility, self.rule)
        return select(self.backend, query, key, mask).attend(query, key, value, mask)
