"""Norms of q, k and v and rotation of q and k as one step of autograd, in torch.

What it computes is `bridge.megatron.attention.norm_and_rotate` written out; nothing but the fused projection and one
float32 number a head is kept for the backward pass, which writes the projection's gradient as it lies. Gradients: for
u the gradient of a normed head before its weight, s = 1 / rms(x), the head's own is s (u - x s^2 mean(u x)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron.norm import inverse_rms


class QkvNormRope(torch.autograd.Function):
    """`norm_and_rotate`, of the same arguments; `signed_sin` is that of `Rotary`."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed_qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor | None,
        cos: Tensor,
        signed_sin: Tensor,
        query_rows: range,
        kv_rows: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        wide = mixed_qkv.float()
        scale = inverse_rms(wide, eps)
        ctx.save_for_backward(mixed_qkv, query_weight, key_weight, cos, signed_sin, scale)
        ctx.rows = own, key, value = _rows(mixed_qkv, query_rows, kv_rows)

        def normed(rows: slice, weight: Tensor | None) -> Tensor:
            heads = wide[:, :, :, rows] * scale[:, :, :, rows]
            if weight is not None:
                heads *= weight.float()
            return heads.type_as(mixed_qkv).flatten(2, 3)

        query = _rotate(normed(own, query_weight), cos, signed_sin)
        if not kv_rows:
            return (query,)
        return query, _rotate(normed(key, key_weight), cos, signed_sin), normed(value, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, *d_rest: Tensor) -> tuple[Tensor | None, ...]:
        mixed_qkv, query_weight, key_weight, cos, signed_sin, scale = ctx.saved_tensors
        own, key, value = ctx.rows
        wide = mixed_qkv.float()
        # Of normed heads, before their weights; `along` is the sum of its products with the heads.
        d_normed = torch.zeros_like(wide) if own.stop - own.start < key.start else torch.empty_like(wide)
        along = torch.zeros_like(scale)

        def through_weight(rows: slice, weight: Tensor, gradient: Tensor, wanted: bool) -> Tensor | None:
            heads = wide[:, :, :, rows]
            unrotated = _rotate(gradient, cos, signed_sin, back=True).view(heads.shape).float()
            products = (unrotated * heads).flatten(0, -2)
            along[:, :, :, rows] = (products @ weight.float()).view(*heads.shape[:-1], 1)
            torch.mul(unrotated, weight.float(), out=d_normed[:, :, :, rows])
            return (scale[:, :, :, rows].flatten() @ products).to(weight.dtype) if wanted else None

        d_query_weight = through_weight(own, query_weight, d_query, ctx.needs_input_grad[1])
        d_key_weight = None
        if d_rest:
            d_key, d_value = d_rest
            d_key_weight = through_weight(key, key_weight, d_key, ctx.needs_input_grad[2])
            d_value = d_value.unsqueeze(3).float()
            of_value = (d_value * wide[:, :, :, value]).sum(-1, keepdim=True)
            if key == value:
                d_normed[:, :, :, value] += d_value
                along[:, :, :, value] += of_value
            else:
                d_normed[:, :, :, value], along[:, :, :, value] = d_value, of_value
        along.mul_(scale).mul_(scale).div_(-wide.shape[-1])
        d_mixed_qkv = d_normed.addcmul_(wide, along).mul_(scale).type_as(mixed_qkv)
        return d_mixed_qkv, d_query_weight, d_key_weight, None, None, None, None, None


def _rows(mixed_qkv: Tensor, query_rows: range, kv_rows: int) -> tuple[slice, slice, slice]:
    """Rows of a group: this rank's queries, the key, the value (the key's, where it is made of it)."""
    rows = mixed_qkv.shape[3]
    key = rows - kv_rows
    return slice(query_rows.start, query_rows.stop), slice(key, key + 1), slice(rows - 1, rows)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, back: bool = False) -> Tensor:
    """`bridge.megatron.rope.rotate` of `x` [s, b, heads, d], or the gradient of what it was made of."""
    output = torch.mul(x, cos, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    half = x.shape[-1] // 2
    other, sin = x.roll(half, -1), signed_sin.roll(half, -1) if back else signed_sin
    if x.dtype is torch.float32:
        return output.addcmul_(other, sin)
    return output.add_(other.mul_(sin))  # each product is rounded before the sum
