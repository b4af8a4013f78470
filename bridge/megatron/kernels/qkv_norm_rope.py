"""Norms of q, k and v and rotation of q and k in one pass over the fused projection, forward and backward.

The definition is `bridge.megatron.attention.norm_and_rotate`: RMSNorm with a weight for every head of q and k, without
for v, then `bridge.megatron.rope.rotate`. The projection is read as it lies, [q ... q k v] per query group, and its
gradient is written as it lies, so that nothing is split, copied or padded; it is all that is kept for the backward
pass. Where V is K (no v_proj) a row of k serves both, and its gradient is the sum of both.

A head is held as its two halves, which rotation pairs. Backward, with (g1, g2) = (dy1 cos1 + dy2 sin2,
dy2 cos2 - dy1 sin1) the rest is that of RMSNorm. Rounding is as in torch: after the norm, after each product with cos
and sin, after their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.kernels.launch import TILE, num_programs, num_warps, power_of_2
from bridge.megatron.kernels.rounding import round_to

# Products of bf16 that are rounded, then added and rounded, become one fused operation with one rounding otherwise.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _kv_rows(
    row: tl.tensor, rows: tl.tensor, QUERIES: tl.constexpr, FIRST: tl.constexpr, OWN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of rows of a token [n, 1]: whether they are queries of this rank, keys, values."""
    slot = row % rows
    is_query = (slot >= FIRST) & (slot < FIRST + OWN)
    return is_query, slot == QUERIES, slot == QUERIES + 1


@triton.jit
def _round(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    return round_to(x, like.dtype.element_ty).to(tl.float32)


@triton.jit
def _weights(
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    is_query: tl.tensor,
    is_key: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """[rows, columns]: 1 for values."""
    weight = tl.load(query_weight + column, mask & is_query, other=1.0).to(tl.float32)
    if key_weight is not None:
        weight = tl.where(is_key, tl.load(key_weight + column, mask & is_key, other=1.0).to(tl.float32), weight)
    return weight


@triton.jit
def qkv_norm_rope_forward_kernel(
    mixed_qkv: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    token_stride: tl.tensor,
    group_stride: tl.tensor,
    row_stride: tl.tensor,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    FIRST: tl.constexpr,
    OWN: tl.constexpr,
    V_IS_K: tl.constexpr,
    D: tl.constexpr,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """BLOCK of the GROUPS x ROWS rows [D] of one token -> `query`, and `key` and `value` where they are not None."""
    blocks = tl.cdiv(GROUPS * ROWS, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, HALF)[None, :]
    half = D // 2
    group = row // ROWS
    is_query, is_key, is_value = _kv_rows(row, ROWS, QUERIES, FIRST, OWN)
    in_half = column < half
    mask = (row < GROUPS * ROWS) & in_half & (is_query | is_key | is_value)

    start = mixed_qkv + token * token_stride + group * group_stride + row % ROWS * row_stride + column
    x1 = tl.load(start, mask, other=0.0).to(tl.float32)
    x2 = tl.load(start + half, mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
    x1, x2 = x1 * scale, x2 * scale
    if value is not None:
        place = value + (token * GROUPS + group) * D + column
        is_source = mask & (is_key if V_IS_K else is_value)
        tl.store(place, round_to(x1, place.dtype.element_ty), is_source)
        tl.store(place + half, round_to(x2, place.dtype.element_ty), is_source)
    n1 = _round(x1 * _weights(query_weight, key_weight, is_query, is_key, column, mask), query)
    n2 = _round(x2 * _weights(query_weight, key_weight, is_query, is_key, column + half, mask), query)

    angle = token * D + column
    cos1, cos2 = tl.load(cos + angle, in_half).to(tl.float32), tl.load(cos + angle + half, in_half).to(tl.float32)
    sin1, sin2 = tl.load(sin + angle, in_half).to(tl.float32), tl.load(sin + angle + half, in_half).to(tl.float32)
    y1 = _round(n1 * cos1, query) - _round(n2 * sin1, query)
    y2 = _round(n2 * cos2, query) + _round(n1 * sin2, query)
    place = query + (token * GROUPS * OWN + group * OWN + row % ROWS - FIRST) * D + column
    tl.store(place, round_to(y1, place.dtype.element_ty), mask & is_query)
    tl.store(place + half, round_to(y2, place.dtype.element_ty), mask & is_query)
    if key is not None:
        place = key + (token * GROUPS + group) * D + column
        tl.store(place, round_to(y1, place.dtype.element_ty), mask & is_key)
        tl.store(place + half, round_to(y2, place.dtype.element_ty), mask & is_key)


@triton.jit
def qkv_norm_rope_backward_kernel(
    mixed_qkv: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    d_query: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    d_mixed_qkv: tl.tensor,
    d_weight: tl.tensor,
    tokens: tl.tensor,
    token_stride: tl.tensor,
    group_stride: tl.tensor,
    row_stride: tl.tensor,
    d_query_token_stride: tl.tensor,
    d_query_head_stride: tl.tensor,
    d_key_token_stride: tl.tensor,
    d_key_head_stride: tl.tensor,
    d_value_token_stride: tl.tensor,
    d_value_head_stride: tl.tensor,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    FIRST: tl.constexpr,
    OWN: tl.constexpr,
    V_IS_K: tl.constexpr,
    D: tl.constexpr,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """The same rows of every num_programs-th token: `d_mixed` [tokens, GROUPS, ROWS, D], all of it.

    `d_weight` [num_programs, 2, D] float32 are these tokens' sums for the weights of q and of k, or None.
    """
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, HALF)[None, :]
    half = D // 2
    group = row // ROWS
    is_query, is_key, is_value = _kv_rows(row, ROWS, QUERIES, FIRST, OWN)
    in_half = column < half
    there = (row < GROUPS * ROWS) & in_half
    mask = there & (is_query | is_key | is_value)
    head = group * OWN + row % ROWS - FIRST
    weight1 = _weights(query_weight, key_weight, is_query, is_key, column, mask)
    weight2 = _weights(query_weight, key_weight, is_query, is_key, column + half, mask)
    total1 = tl.zeros((BLOCK, HALF), tl.float32)
    total2 = tl.zeros((BLOCK, HALF), tl.float32)

    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = number + tl.zeros((1, 1), tl.int64)
        start = mixed_qkv + token * token_stride + group * group_stride + row % ROWS * row_stride + column
        x1 = tl.load(start, mask, other=0.0).to(tl.float32)
        x2 = tl.load(start + half, mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        x1, x2 = x1 * scale, x2 * scale

        place = d_query + token * d_query_token_stride + head * d_query_head_stride + column
        y1 = tl.load(place, mask & is_query, other=0.0).to(tl.float32)
        y2 = tl.load(place + half, mask & is_query, other=0.0).to(tl.float32)
        if d_key is not None:
            place = d_key + token * d_key_token_stride + group * d_key_head_stride + column
            y1 += tl.load(place, mask & is_key, other=0.0).to(tl.float32)
            y2 += tl.load(place + half, mask & is_key, other=0.0).to(tl.float32)
        angle = token * D + column
        cos1, cos2 = tl.load(cos + angle, in_half).to(tl.float32), tl.load(cos + angle + half, in_half).to(tl.float32)
        sin1, sin2 = tl.load(sin + angle, in_half).to(tl.float32), tl.load(sin + angle + half, in_half).to(tl.float32)
        g1 = _round(_round(y1 * cos1, d_mixed_qkv) + _round(y2 * sin2, d_mixed_qkv), d_mixed_qkv)
        g2 = _round(_round(y2 * cos2, d_mixed_qkv) - _round(y1 * sin1, d_mixed_qkv), d_mixed_qkv)
        if d_weight is not None:
            total1 += g1 * x1
            total2 += g2 * x2
        g1 *= weight1
        g2 *= weight2
        if d_value is not None:
            is_source = mask & (is_key if V_IS_K else is_value)
            place = d_value + token * d_value_token_stride + group * d_value_head_stride + column
            g1 += tl.load(place, is_source, other=0.0).to(tl.float32)
            g2 += tl.load(place + half, is_source, other=0.0).to(tl.float32)
        inner = ((tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / D)[:, None]
        place = d_mixed_qkv + token * (GROUPS * ROWS * D) + row * D + column
        tl.store(place, round_to((g1 - x1 * inner) * scale, place.dtype.element_ty), there)
        tl.store(place + half, round_to((g2 - x2 * inner) * scale, place.dtype.element_ty), there)

    if d_weight is not None:
        blocks = tl.num_programs(1)
        place = d_weight + (tl.program_id(0) * blocks + tl.program_id(1)) * (2 * D) + column
        tl.store(place, tl.sum(tl.where(is_query, total1, 0.0), 0)[None, :], in_half)
        tl.store(place + half, tl.sum(tl.where(is_query, total2, 0.0), 0)[None, :], in_half)
        tl.store(place + D, tl.sum(tl.where(is_key, total1, 0.0), 0)[None, :], in_half)
        tl.store(place + D + half, tl.sum(tl.where(is_key, total2, 0.0), 0)[None, :], in_half)


def qkv_norm_rope(
    mixed_qkv: Tensor,
    query_rows: range,
    kv_rows: int,
    query_weight: Tensor,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `bridge.megatron.attention.norm_and_rotate`; all of one dtype, `mixed_qkv` of any strides but in d."""
    return _QkvNormRope.apply(mixed_qkv, query_weight, key_weight, cos, sin, query_rows, kv_rows, eps)


class _QkvNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed_qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        query_rows: range,
        kv_rows: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        length, batch, groups, _, d = mixed_qkv.shape
        counts = [groups * len(query_rows)] + ([groups, groups] if kv_rows else [])
        outputs = [torch.empty(length, batch, n, d, dtype=mixed_qkv.dtype, device=mixed_qkv.device) for n in counts]
        if mixed_qkv.numel():
            tokens = _tokens(mixed_qkv)
            shape, blocks = _tile(tokens, query_rows, kv_rows)
            with torch.cuda.device_of(mixed_qkv):
                qkv_norm_rope_forward_kernel[(len(tokens) * blocks,)](
                    tokens,
                    query_weight,
                    key_weight,
                    cos.contiguous(),
                    sin.contiguous(),
                    *(outputs if kv_rows else [*outputs, None, None]),
                    *tokens.stride()[:3],
                    eps=eps,
                    **shape,
                )
        ctx.save_for_backward(mixed_qkv, query_weight, key_weight, cos, sin)
        ctx.query_rows, ctx.kv_rows, ctx.eps = query_rows, kv_rows, eps
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
        mixed_qkv, query_weight, key_weight, cos, sin = ctx.saved_tensors
        tokens = _tokens(mixed_qkv)
        shape, blocks = _tile(tokens, ctx.query_rows, ctx.kv_rows)
        programs = num_programs(mixed_qkv, len(tokens))
        d_mixed_qkv = torch.empty(mixed_qkv.shape, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        parts = None
        if any(ctx.needs_input_grad[1:3]):
            parts = torch.empty(programs, blocks, 2, mixed_qkv.shape[-1], dtype=torch.float32, device=mixed_qkv.device)
        gradients: list[Tensor | None] = [_tokens(x) for x in (d_query, *rest)]
        gradients += [None] * (3 - len(gradients))
        if programs:
            with torch.cuda.device_of(mixed_qkv):
                qkv_norm_rope_backward_kernel[(programs, blocks)](
                    tokens,
                    query_weight,
                    key_weight,
                    cos.contiguous(),
                    sin.contiguous(),
                    *gradients,
                    d_mixed_qkv,
                    parts,
                    len(tokens),
                    *tokens.stride()[:3],
                    *(stride for x in gradients for stride in ((0, 0) if x is None else x.stride()[:2])),
                    eps=ctx.eps,
                    **shape,
                )
        d_weights: list[Tensor | None] = [None, None]
        if parts is not None:
            for i, (weight, total) in enumerate(zip((query_weight, key_weight), parts.sum((0, 1)), strict=True)):
                d_weights[i] = total.to(weight.dtype) if ctx.needs_input_grad[1 + i] else None
        return d_mixed_qkv, *d_weights, None, None, None, None, None


def _tokens(x: Tensor) -> Tensor:
    """[s, b, ...] as [s * b, ...] with neighbouring elements in a row; a view where strides allow it, else a copy."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(tokens: Tensor, query_rows: range, kv_rows: int) -> tuple[dict[str, Any], int]:
    """Constants of the kernels, and how many programs share the rows of a token."""
    _, groups, rows, d = tokens.shape
    half = power_of_2(d // 2)
    block = max(1, min(TILE // (2 * half), power_of_2(groups * rows)))
    shape = {
        "GROUPS": groups,
        "ROWS": rows,
        "QUERIES": rows - kv_rows,
        "FIRST": query_rows.start,
        "OWN": len(query_rows),
        "V_IS_K": kv_rows == 1,
        "D": d,
        "BLOCK": block,
        "HALF": half,
        "num_warps": num_warps(2 * block * half),
        **OPTIONS,
    }
    return shape, triton.cdiv(groups * rows, block)
