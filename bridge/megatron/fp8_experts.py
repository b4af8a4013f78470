"""Grouped products of experts in FP8: operands rounded to E4M3, a scale for each row along what is summed over.

The product of tokens with the weights, and that of gradients with the weights, are FP8 (`scaled_grouped_mm`, which
takes the ends of the experts' rows from the device); the gradient of the weights sums over the tokens of each expert
and stays in bf16: there FP8 would want every expert's rows padded to a multiple of 16. Weights stay as they are and are
rounded for each product: nothing outlives it.

Written against the interface and the source of torch 2.13; its product has no CPU kernel, so it has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType

from bridge.megatron.kernels import fused

E4M3 = torch.float8_e4m3fn
# The largest number of E4M3, and what a row's largest is taken to be at least: its scale and the inverse are finite.
LARGEST, SMALLEST = 448.0, 1e-30


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, kernels: str) -> Tensor:
    """Rows [t, in] sorted by expert, which end at `offsets` [E'] int32, by each expert's weight [E', out, in].

    Returns [t, out] in the dtype of `x`, bf16. `in` and `out` are multiples of 16.
    """
    output: Tensor = _GroupedProduct.apply(x, weight, offsets, kernels)
    return output


def quantize_rows(x: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """[..., n] -> E4M3 [..., n] whose rows reach to 448, and what to multiply each by, float32 [...]."""
    if fused(kernels, x):
        from bridge.megatron.kernels import fp8

        return fp8.quantize_rows(x)
    top = x.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST)
    # A tensor, since torch takes the rounded reciprocal where one side is a number.
    largest = torch.full_like(top, LARGEST)
    return (x.float() * (largest / top)).to(E4M3), (top / largest).squeeze(-1)


def quantize_columns(weight: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the transposed matrices: [E', n, m] -> E4M3 [E', m, n], float32 [E', m]."""
    if fused(kernels, weight):
        from bridge.megatron.kernels import fp8

        return fp8.quantize_columns(weight)
    return quantize_rows(weight.transpose(1, 2).contiguous(), kernels)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, kernels: str) -> Tensor:
        # A frozen weight needs nothing of the tokens.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)
        ctx.kernels = kernels
        return _product(quantize_rows(x, kernels), quantize_rows(weight, kernels), offsets, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, offsets = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            rows, columns = quantize_rows(gradient, ctx.kernels), quantize_columns(weight, ctx.kernels)
            dx = _product(rows, columns, offsets, gradient.dtype, fast=False)
        if ctx.needs_input_grad[1]:
            dw = torch.nn.functional.grouped_mm(gradient.t(), x, offs=offsets)
        return dx, dw, None, None


def _product(
    x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], offsets: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """[t, n] by [E', m, n] transposed -> [t, m]. `fast`: sums of 14 bits on the tensor cores, as forward passes take
    them elsewhere too (Transformer Engine's); gradients are summed in float32."""
    (rows, row_scale), (matrices, matrix_scale) = x, weight
    if not len(rows):
        return torch.empty(0, matrices.shape[1], dtype=dtype, device=rows.device)
    output: Tensor = torch.nn.functional.scaled_grouped_mm(  # type: ignore[attr-defined]  # not in torch's stubs
        rows,
        matrices.transpose(1, 2),
        row_scale,
        ScalingType.RowWise,
        matrix_scale,
        ScalingType.RowWise,
        offs=offsets,
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    return output
