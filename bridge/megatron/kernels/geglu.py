"""gelu_tanh(gate) * up in one pass, forward and backward (the definition is `bridge.megatron.activation`).

Kept for the backward pass are gate and up alone. gelu_tanh(x) is x σ(2u) with u = √(2/π) (x + 0.044715 x³), which is
½ x (1 + tanh u) without the cancellation. In half precision the activation is rounded before the product and its
gradient before it is multiplied on, as torch and transformers do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.kernels.launch import as_rows, power_of_2
from bridge.megatron.kernels.rounding import round_to

_TILE = 1024
_TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def _place(n: tl.tensor, HEIGHT: tl.constexpr, WIDTH: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Rows [HEIGHT, 1] and columns [1, WIDTH] of a program; as many programs as it takes share rows of `n`."""
    blocks = tl.cdiv(n, WIDTH)
    row = tl.program_id(0) // blocks * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    return row.to(tl.int64), tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _share(x: tl.tensor) -> tl.tensor:
    """gelu_tanh(x) / x"""
    return tl.sigmoid((x + 0.044715 * x * x * x) * _TWICE_ROOT)


@triton.jit
def geglu_forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Rows [n] of `gate` and `up` -> `output`."""
    row, column = _place(n, HEIGHT, WIDTH)
    mask = (row < rows) & (column < n)
    x = tl.load(gate + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask, other=0.0).to(tl.float32)
    activation = x * _share(x)
    dtype: tl.constexpr = output.dtype.element_ty
    activation = round_to(activation, dtype).to(tl.float32)
    tl.store(output + row * n + column, round_to(activation * factor, dtype), mask)


@triton.jit
def geglu_backward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    d_output: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    d_output_stride: tl.tensor,
    d_gate_stride: tl.tensor,
    d_up_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Rows [n] of the gradients of `gate` and `up`."""
    row, column = _place(n, HEIGHT, WIDTH)
    mask = (row < rows) & (column < n)
    x = tl.load(gate + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_output + row * d_output_stride + column, mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = d_gate.dtype.element_ty
    share = _share(x)
    activation = round_to(x * share, dtype).to(tl.float32)
    slope = share + x * share * (1 - share) * (1 + 3 * 0.044715 * x * x) * _TWICE_ROOT
    d_activation = round_to(gradient * factor, dtype).to(tl.float32)
    tl.store(d_gate + row * d_gate_stride + column, round_to(d_activation * slope, dtype), mask)
    tl.store(d_up + row * d_up_stride + column, round_to(gradient * activation, dtype), mask)


def geglu(x: Tensor) -> Tensor:
    """`x` [..., 2 n] is gate and up side by side -> [..., n]; their gradients are written side by side at once."""
    return _GeGLU.apply(x)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gate` and `up` [..., n] -> [..., n]."""
    return _GatedGelu.apply(gate, up)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward(*x.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (gate, up), (d_gate, d_up) = x.chunk(2, dim=-1), dx.chunk(2, dim=-1)
        _backward(gate, up, d_output, d_gate, d_up)
        return dx


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        _backward(gate, up, d_output, d_gate, d_up)
        return d_gate, d_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if output.numel():
        gate, up = as_rows(gate), as_rows(up)
        shape, programs = _tile(gate)
        with torch.cuda.device_of(gate):
            geglu_forward_kernel[(programs,)](gate, up, output, *gate.shape, gate.stride(0), up.stride(0), **shape)
    return output


def _backward(gate: Tensor, up: Tensor, d_output: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Into `d_gate` and `d_up`, whose rows lie at one distance."""
    if d_gate.numel():
        tensors = [as_rows(x) for x in (gate, up, d_output, d_gate, d_up)]
        shape, programs = _tile(tensors[0])
        with torch.cuda.device_of(gate):
            geglu_backward_kernel[(programs,)](*tensors, *tensors[0].shape, *(x.stride(0) for x in tensors), **shape)


def _tile(rows: Tensor) -> tuple[dict[str, int], int]:
    """Constants of the kernels, and how many programs they take."""
    width = min(_TILE, power_of_2(rows.shape[1]))
    height = min(_TILE // width, power_of_2(len(rows)))
    programs = triton.cdiv(len(rows), height) * triton.cdiv(rows.shape[1], width)
    return {"HEIGHT": height, "WIDTH": width, "num_warps": 4}, programs
