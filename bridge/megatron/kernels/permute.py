"""Rows of tokens to the order of their experts and back (the definition is `bridge.megatron.local_dispatcher`).

Every token goes to the same number of experts, so that its copies are summed by reading them: no atomic additions, the
same result every time, one rounding. The gradient of spreading is that sum, and the gradient of the sum is spreading.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.kernels.launch import as_rows, power_of_2
from bridge.megatron.kernels.rounding import narrow

_BLOCK = 1024


@triton.jit
def collect_kernel(
    rows: tl.tensor,
    places: tl.tensor,
    output: tl.tensor,
    n: tl.tensor,
    rows_stride: tl.tensor,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one token: the float32 sum of its COPIES rows [n], those at `places` [tokens, COPIES]."""
    blocks = tl.cdiv(n, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for copy in range(COPIES):
        place = tl.load(places + token * COPIES + copy)
        total += tl.load(rows + place * rows_stride + column, column < n, other=0.0).to(tl.float32)
    tl.store(output + token * n + column, narrow(total, output.dtype.element_ty), column < n)


def spread(tokens: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """`tokens` [t, n] -> [t * copies, n], row i that of `source[i]`; `places` [t, copies] int64 is the inverse."""
    return _Spread.apply(tokens, source, places)


def collect(rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """`rows` [t * copies, n] -> [t, n], the sum of each token's."""
    return _Collect.apply(rows, source, places)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _collect(d_rows, places), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _collect(rows, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return d_tokens.index_select(0, source), None, None


def _collect(rows: Tensor, places: Tensor) -> Tensor:
    tokens, copies = places.shape
    rows, places = as_rows(rows), places.contiguous()
    n = rows.shape[1]
    output = torch.empty(tokens, n, dtype=rows.dtype, device=rows.device)
    if output.numel():
        block = min(_BLOCK, power_of_2(n))
        with torch.cuda.device_of(rows):
            collect_kernel[(tokens * triton.cdiv(n, block),)](
                rows, places, output, n, rows.stride(0), COPIES=copies, BLOCK=block, num_warps=4
            )
    return output
