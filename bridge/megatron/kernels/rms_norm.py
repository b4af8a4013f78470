"""RMSNorm, with what is added to it, forward and backward (the definition is `bridge.megatron.norm.rms_norm`).

Kept for the backward pass is the input alone: the statistic of a row is computed again from the row that is read
anyway. With y = x̂ w and x̂ = x r, r = (mean(x²) + eps)^-½, and g = dy w: dx = r (g - x̂ mean(g x̂)), dw = Σ dy x̂.
Everything is float32 between load and store.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.kernels.launch import as_rows, num_programs, row_tile
from bridge.megatron.kernels.rounding import round_to


@triton.jit
def rms_norm_forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS rows [N] a program; `weight` and `residual` may be None."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < N)
    dtype: tl.constexpr = output.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / N + eps)[:, None]
    if weight is not None:
        normed *= tl.load(weight + column, column < N, other=0.0).to(tl.float32)
    if residual is not None:
        # The norm has a dtype of its own before it is added.
        normed = round_to(normed, dtype).to(tl.float32)
        normed += tl.load(residual + row * residual_stride + column, mask, other=0.0).to(tl.float32)
    tl.store(output + row * N + column, round_to(normed, dtype), mask)


@triton.jit
def rms_norm_backward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    d_output: tl.tensor,
    dx: tl.tensor,
    dw: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    d_output_stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Every num_programs-th piece of ROWS rows; `dw` [num_programs, N] float32 is the sum over them, or None."""
    column = tl.arange(0, COLUMNS)[None, :]
    if weight is not None:
        w = tl.load(weight + column, column < N, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for piece in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (piece * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < N)
        wide = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gradient = tl.load(d_output + row * d_output_stride + column, mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / N + eps)[:, None]
        normed = wide * scale
        if dw is not None:
            total += gradient * normed
        if weight is not None:
            gradient *= w
        inner = tl.sum(gradient * normed, 1)[:, None] / N
        tl.store(dx + row * N + column, round_to((gradient - normed * inner) * scale, dx.dtype.element_ty), mask)
    if dw is not None:
        tl.store(dw + tl.program_id(0) * N + column, tl.sum(total, 0)[None, :], column < N)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """Norm of the last axis of `x` [..., n] times `weight` [n], plus `residual` [..., n], in the dtype of `x`."""
    return _RMSNorm.apply(x, weight, residual, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
        rows = as_rows(x)
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        added = None if residual is None else as_rows(residual)
        if output.numel():
            shape = row_tile(rows)
            with torch.cuda.device_of(x):
                rms_norm_forward_kernel[(triton.cdiv(len(rows), shape["ROWS"]),)](
                    rows,
                    weight,
                    added,
                    output,
                    len(rows),
                    rows.stride(0),
                    0 if added is None else added.stride(0),
                    eps,
                    **shape,
                )
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_residual, _ = ctx.needs_input_grad
        dx = dw = None
        if to_x or to_weight:
            rows, gradient = as_rows(x), as_rows(d_output)
            shape = row_tile(rows)
            programs = num_programs(x, triton.cdiv(len(rows), shape["ROWS"]))
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device) if to_weight else None
            if programs:
                with torch.cuda.device_of(x):
                    rms_norm_backward_kernel[(programs,)](
                        rows,
                        weight,
                        gradient,
                        dx,
                        parts,
                        len(rows),
                        rows.stride(0),
                        gradient.stride(0),
                        ctx.eps,
                        **shape,
                    )
            dw = None if parts is None else parts.sum(0).to(weight.dtype)
        return dx if to_x else None, dw, d_output if to_residual else None, None
