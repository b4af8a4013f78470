"""Dense attention: the oracle that every other backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.megatron.mask import Mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Scores in the dtype of `query`, softmax in float32 (transformers, eager). The only place that makes [sq, sk].

    The softmax scale is 1: Gemma 4 norms q and k instead.
    """
    repeat = query.shape[2] // key.shape[2]
    query = query.permute(1, 2, 0, 3)
    key = key.permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    value = value.permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    scores = query @ key.transpose(2, 3)
    scores = scores.masked_fill(~mask.dense[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).permute(2, 0, 1, 3)


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """It honours everything."""
    return None
