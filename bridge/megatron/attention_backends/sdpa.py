"""torch's scaled_dot_product_attention, only where one of its linear-memory kernels is certain to run.

That is: rows of one document each, purely causal. Any other mask would be an [s, s] tensor. The kernel is named, so
that torch raises instead of taking its quadratic math path in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge.errors import UsageError
from bridge.megatron.mask import Mask

# On a CPU the flash kernel takes any head dim and groups. On a GPU it stops at 256; the memory-efficient one does not.
_CPU_KERNELS = [SDPBackend.FLASH_ATTENTION]
_GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[s, b, heads, d], and [s, b, groups, d] twice -> [s, b, heads, d]. Raises UsageError without a kernel."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if query.is_cuda:
        # With enable_gqa the memory-efficient kernel is not offered; repeated heads it takes.
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    try:
        with sdpa_kernel(_GPU_KERNELS if query.is_cuda else _CPU_KERNELS):
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=1.0, enable_gqa=not query.is_cuda
            )
    except RuntimeError as error:
        if "available kernel" not in str(error).lower():
            raise
        raise UsageError(f"sdpa has no linear-memory kernel for {list(query.shape)} {query.dtype} here") from error
    return output.permute(2, 0, 1, 3)


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Only rows whose every token sees exactly what stands before it."""
    if mask.rows != mask.columns:
        return "queries are a part of the row"
    if not mask.causal or not mask.whole_rows:
        return "it is causal over whole rows only"
    return None
