"""FlexAttention forward; backward the products of `bridge.megatron.kernels.attention_backward`, on Hopper GPUs.

FlexAttention's backward kernel for head dim 512 has tiles of 32 and no Hopper matrix instruction (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.megatron import kernels
from bridge.megatron.attention_backends import flex
from bridge.megatron.kernels.attention_tiles import TILE, Runs, TileRange, plan
from bridge.megatron.mask import Mask

_HOPPER = (9, 0)
_HEAD_DIMS = (64, 128, 256, 512)
# Bytes of the weights and gradients of scores that are held at a time.
WORKSPACE = 512 << 20


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d]."""
    output: Tensor = _FlexTriton.apply(query, key, value, mask)
    return output


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Tiles are those of a Hopper GPU, for half precision. On a CPU in Triton's interpreter, for tests."""
    if not kernels.installed():
        return "the package triton is not installed"
    if not query.is_cuda:
        return None if kernels.interpreted() else "it needs a Hopper GPU"
    if torch.cuda.get_device_capability(query.device) != _HOPPER:
        return "it needs a Hopper GPU"
    if query.shape[-1] not in _HEAD_DIMS or query.dtype is torch.float32:
        return f"it takes head dims {', '.join(map(str, _HEAD_DIMS))} in bfloat16 or float16"
    return flex.refuse(query, key, mask)


class _FlexTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        output, lse = flex.attend_with_lse(query, key, value, mask)
        ctx.mask = mask
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from bridge.megatron.kernels.attention_backward import attention_backward

        query, key, value, output, lse = ctx.saved_tensors
        runs, parts = runs_of(ctx.mask), parts_of(ctx.mask, query)
        return *attention_backward(query, key, value, output, lse, grad, runs, parts), None


def runs_of(mask: Mask, size: int = TILE) -> Runs:
    """What the kernels are told of `mask`, in tiles of `size`, on its device; made once a step."""
    made = mask.cache.get(("flex_triton", size))
    if made is None:
        made = mask.cache[("flex_triton", size)] = _runs(mask, size)
    assert isinstance(made, Runs)
    return made


def _runs(mask: Mask, size: int) -> Runs:
    place = mask.column_places
    first, stop = (torch.searchsorted(place, x.contiguous()) for x in mask.reach)
    # Neither bound decreases from tile to tile: then the tiles of queries that see a tile of columns are one run too.
    lowest = flex.blocks(first, size, "amin").flip(1).cummin(1).values.flip(1)
    furthest = flex.blocks(stop, size, "amax").cummax(1).values
    low, high = lowest // size, (furthest + size - 1) // size
    columns = torch.arange(-(-len(place) // size), device=place.device).expand(len(low), -1).contiguous()
    row_low, row_high = (torch.searchsorted(x.contiguous(), columns, right=True) for x in (high, low))
    every = (first, stop, mask.row_document, mask.column_document, low, high, row_low, row_high)
    return Runs(*(x.to(torch.int32).contiguous() for x in every))


def parts_of(mask: Mask, query: Tensor) -> list[TileRange]:
    """The queries in parts whose weights and gradients of scores take at most `WORKSPACE` bytes, if one tile's do."""
    most = WORKSPACE // (2 * query.shape[1] * query.shape[2] * TILE * TILE * query.element_size())
    key = ("flex_triton parts", most)
    parts = mask.cache.get(key)
    if parts is None:
        runs = runs_of(mask.on_host)
        parts = mask.cache[key] = plan(runs.low.amin(0).tolist(), runs.high.amax(0).tolist(), most)
    assert isinstance(parts, list)
    return parts
