"""Core attention: softmax(q k^T) v under a description of what is visible. Backends stand behind one function type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.megatron.visibility import MaskRule, Visibility

# (query [s, b, heads, d], key [s, b, groups, d], value [s, b, groups, d], visibility, rule) -> [s, b, heads, d]
Backend = Callable[[Tensor, Tensor, Tensor, Visibility, MaskRule], Tensor]


def reference(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, rule: MaskRule) -> Tensor:
    """Dense attention, the oracle: scores in the dtype of `query`, softmax in float32 (transformers, eager).

    The softmax scale is 1: Gemma 4 norms q and k instead.
    """
    repeat = query.shape[2] // key.shape[2]
    query = query.permute(1, 2, 0, 3)
    key = key.permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    value = value.permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    scores = query @ key.transpose(2, 3)
    scores = scores.masked_fill(~visibility.dense(rule)[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).permute(2, 0, 1, 3)


BACKENDS: dict[str, Backend] = {"reference": reference}


class CoreAttention(torch.nn.Module):
    """The module Megatron's attention holds. It has no parameters; `rule` is the layer's own."""

    def __init__(self, config: TransformerConfig, *, rule: MaskRule, backend: str, **_: Any) -> None:
        super().__init__()
        self.rule = rule
        self.backend = BACKENDS[backend]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """[s, b, heads, d] and [s, b, groups, d] twice -> [s, b, heads * d]."""
        return self.backend(query, key, value, visibility, self.rule).flatten(2)
