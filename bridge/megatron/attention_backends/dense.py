"""torch's scaled_dot_product_attention under a dense mask, for rows so short that tiles do not pay.

On a CPU its flash kernel takes any head dim, groups and mask, and keeps no scores for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.megatron.mask import Mask

# Keys up to which one product is faster than tiles of it (benchmarks/attention.py --lengths 128); a mask is [s, s].
SHORT = 128


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d]."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.dense[:, None], scale=1.0, enable_gqa=True
    )
    return output.permute(2, 0, 1, 3)


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Short rows, and a CPU: a GPU has no linear-memory kernel for every head dim under a mask."""
    if query.is_cuda:
        return "it is for a CPU"
    if key.shape[0] > SHORT:
        return f"its mask is dense: it takes rows of at most {SHORT} tokens"
    return None
