"""Rows times a number each, forward and backward (the definition is `bridge.megatron.moe.scale_rows`).

With y = x w, w of the row: dx = dy w, dw = Σ dy x. Float32 between load and store; x is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.kernels.launch import as_rows, row_tile
from bridge.megatron.kernels.rounding import round_to


@triton.jit
def scale_rows_forward_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS rows [N] a program, `weights` [rows] float32."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < N)
    weight = tl.load(weights + row, row < rows, other=0.0)[:, None]
    wide = tl.load(x + row[:, None] * x_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(output + row[:, None] * N + column, round_to(wide * weight, output.dtype.element_ty), mask)


@triton.jit
def scale_rows_backward_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    d_output: tl.tensor,
    dx: tl.tensor,
    d_weights: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    d_output_stride: tl.tensor,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS rows [N] a program; `weights` and `d_weights` [rows] float32."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < N)
    weight = tl.load(weights + row, row < rows, other=0.0)[:, None]
    wide = tl.load(x + row[:, None] * x_stride + column, mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_output + row[:, None] * d_output_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * N + column, round_to(gradient * weight, dx.dtype.element_ty), mask)
    tl.store(d_weights + row, tl.sum(gradient * wide, 1), row < rows)


def scale_rows(x: Tensor, weights: Tensor) -> Tensor:
    """`x` [t, n] times `weights` [t] float32, in the dtype of `x`."""
    return _ScaleRows.apply(x, weights)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        rows, output = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if output.numel():
            shape = row_tile(rows)
            with torch.cuda.device_of(x):
                scale_rows_forward_kernel[(triton.cdiv(len(rows), shape["ROWS"]),)](
                    rows, weights.contiguous(), output, len(rows), rows.stride(0), **shape
                )
        ctx.save_for_backward(x, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        rows, gradient = as_rows(x), as_rows(d_output)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weights = torch.zeros(len(x), dtype=torch.float32, device=x.device)
        if dx.numel():
            shape = row_tile(rows)
            with torch.cuda.device_of(x):
                scale_rows_backward_kernel[(triton.cdiv(len(rows), shape["ROWS"]),)](
                    rows,
                    weights.contiguous(),
                    gradient,
                    dx,
                    d_weights,
                    len(rows),
                    rows.stride(0),
                    gradient.stride(0),
                    **shape,
                )
        return dx, d_weights
