"""Rounding to E4M3 with a scale for each row (the definition is `bridge.megatron.fp8_experts.quantize_rows`).

Read once, or twice for a matrix that is transposed on the way, and written once, at a quarter of the bytes that the
same takes in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bridge.megatron.kernels.launch import as_rows, row_tile
from bridge.megatron.kernels.rounding import round_to

_LARGEST = tl.constexpr(448.0)
_SMALLEST = tl.constexpr(1e-30)
_DTYPE = torch.float8_e4m3fn
# Of a matrix that is transposed, what a program holds at a time.
_HEIGHT, _WIDTH = 64, 64


@triton.jit
def quantize_rows_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS rows [N] a program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None] & (column < N)
    wide = tl.load(x + row[:, None] * x_stride + column, mask, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(wide), 1), _SMALLEST)
    scaled = wide * tl.div_rn(tl.full((ROWS,), _LARGEST, tl.float32), top)[:, None]
    tl.store(values + row[:, None] * N + column, round_to(scaled, values.dtype.element_ty), mask)
    tl.store(scales + row, tl.div_rn(top, tl.full((ROWS,), _LARGEST, tl.float32)), row < rows)


@triton.jit
def quantize_columns_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """WIDTH columns of one matrix [N, M] a program: `values` [M, N], `scales` [M]."""
    blocks = tl.cdiv(M, WIDTH)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    x += matrix * N * M
    top = tl.full((WIDTH,), _SMALLEST, tl.float32)
    for start in range(0, N, HEIGHT):
        row = start + tl.arange(0, HEIGHT)
        mask = (row < N)[:, None] & (column < M)[None, :]
        wide = tl.load(x + row[:, None] * M + column[None, :], mask, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(wide), 0))
    factor = tl.div_rn(tl.full((WIDTH,), _LARGEST, tl.float32), top)
    for start in range(0, N, HEIGHT):
        row = start + tl.arange(0, HEIGHT)
        mask = (row < N)[:, None] & (column < M)[None, :]
        wide = tl.load(x + row[:, None] * M + column[None, :], mask, other=0.0).to(tl.float32)
        turned = tl.trans(round_to(wide * factor[None, :], values.dtype.element_ty))
        place = matrix * N * M + column[:, None] * N + row[None, :]
        tl.store(values + place, turned, (column < M)[:, None] & (row < N)[None, :])
    tl.store(scales + matrix * M + column, tl.div_rn(top, tl.full((WIDTH,), _LARGEST, tl.float32)), column < M)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [..., n] -> E4M3 [..., n], float32 [...]."""
    rows = as_rows(x)
    values = torch.empty(x.shape, dtype=_DTYPE, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        shape = row_tile(rows)
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(triton.cdiv(len(rows), shape["ROWS"]),)](
                rows, values, scales, len(rows), rows.stride(0), **shape
            )
    return values, scales


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [E', n, m] -> E4M3 [E', m, n], float32 [E', m]."""
    weight = weight.contiguous()
    experts, n, m = weight.shape
    values = torch.empty(experts, m, n, dtype=_DTYPE, device=weight.device)
    scales = torch.empty(experts, m, dtype=torch.float32, device=weight.device)
    if weight.numel():
        with torch.cuda.device_of(weight):
            quantize_columns_kernel[(experts * triton.cdiv(m, _WIDTH),)](
                weight, values, scales, N=n, M=m, HEIGHT=_HEIGHT, WIDTH=_WIDTH, num_warps=4
            )
    return values, scales
