"""FlexAttention with a BlockMask made from the description, compiled. On a CPU forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from bridge.megatron.mask import Mask

_MOST_KERNELS = 64
_LARGE_HEAD = 256
# Blocks of the mask for heads up to `_LARGE_HEAD` and above: multiples of every tile below.
_BLOCK, _LARGE_BLOCK = 128, 64
# Bytes of shared memory that a program for large heads takes on other GPUs than Hopper's, with 1 kB of the driver's.
_LARGE_HEAD_SHARED = 132_096


def _tiles(forward: tuple[int, int, int, int], backward: tuple[int, int, int, int, int, int]) -> dict[str, int]:
    """Kernel options: tiles of queries and keys, stages, warps; backward tiles of both for dk and dv, then for dq."""
    of_forward = ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
    of_backward = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps")
    options = {f"fwd_{name}": value for name, value in zip(of_forward, forward, strict=True)}
    return options | {f"bwd_{name}": value for name, value in zip(of_backward, backward, strict=True)}


# torch's own tiles for 256 have half the queries of this in flight and spill 1.6 kB a thread backward; those for 512 do
# not fit in the 232,448 bytes of an H100 (test_flex_on_hopper.py). 64 queries are the fewest of its matrix instruction.
_HOPPER = {
    256: _tiles((128, 64, 2, 8), (32, 64, 64, 32, 2, 8)),
    512: _tiles((64, 32, 2, 8), (32, 32, 32, 32, 2, 8)),
}
_OTHER_LARGE_HEAD = _tiles((32, 32, 1, 4), (32, 32, 32, 32, 1, 4))


def kernel_options(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int] | None:
    """Tiles for a GPU of that compute capability; None: torch's own."""
    if capability == (9, 0) and dtype is not torch.float32 and head_dim in _HOPPER:
        return _HOPPER[head_dim]
    return _OTHER_LARGE_HEAD if head_dim > _LARGE_HEAD else None


def block_size(head_dim: int) -> int:
    """Places in a block of the mask: a multiple of every tile of `kernel_options`."""
    return _LARGE_BLOCK if head_dim > _LARGE_HEAD else _BLOCK


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: Mapping[str, int | bool] = MappingProxyType({})
) -> Tensor:
    """[sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d]; `options` go to torch before our own."""
    output: Tensor = _attend(_kernel(query.is_cuda), query, key, value, mask, options=options)
    return output.permute(2, 0, 1, 3)


def attend_with_lse(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp of scores [b, heads, sq] float32. Without gradient; dense on a CPU, for tests."""
    dense: Callable[..., Any] = flex_attention
    kernel = _kernel(True) if query.is_cuda else dense
    with torch.no_grad():
        output, aux = _attend(kernel, query, key, value, mask, AuxRequest(lse=True))
    return output.permute(2, 0, 1, 3), aux.lse


def _attend(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    aux: AuxRequest | None = None,
    options: Mapping[str, int | bool] = MappingProxyType({}),
) -> Any:
    head_dim, device_options = query.shape[-1], None
    if query.is_cuda:
        device_options = kernel_options(head_dim, query.dtype, torch.cuda.get_device_capability(query.device))
    if not torch.is_grad_enabled():
        # On a CPU torch looks at requires_grad even where nothing is recorded.
        query, key, value = query.detach(), key.detach(), value.detach()
    # Two kinds of layers, with and without a gradient, and the shapes of evaluation are more than torch's default.
    with torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
        return kernel(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            block_mask=block_mask(mask, block_size(head_dim)),
            scale=1.0,
            enable_gqa=query.shape[2] != key.shape[2],
            kernel_options={**(device_options or {}), **options} or None,
            return_aux=aux,
        )


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """torch has no backward pass of it on a CPU. Large heads take much of a GPU's shared memory and registers."""
    if query.is_cuda and query.shape[-1] > _LARGE_HEAD:
        if query.dtype is torch.float32:
            return f"in float32 heads above {_LARGE_HEAD} do not fit in registers"
        has = torch.cuda.get_device_properties(query.device).shared_memory_per_multiprocessor
        if has < _LARGE_HEAD_SHARED:
            return f"heads above {_LARGE_HEAD} need {_LARGE_HEAD_SHARED} bytes of shared memory, this GPU has {has}"
    if not query.is_cuda and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "it has no backward pass on a CPU"
    return None


@cache
def _kernel(on_gpu: bool) -> Callable[..., Any]:
    """Compiled, for uncompiled it is dense; `fullgraph`, for so torch raises where it would go on uncompiled.

    Lengths change from step to step, under context parallelism always: on a GPU one kernel comes to serve them all. On
    a CPU torch's code for that does not compile, and every length has its own.
    """
    function: Callable[..., Any] = flex_attention
    return torch.compile(function, fullgraph=True, dynamic=None if on_gpu else False)


def block_mask(mask: Mask, size: int) -> BlockMask:
    """The BlockMask of `mask` in blocks of `size`, made once a step from the intervals: [s / size, s / size]."""
    made = mask.cache.get(("flex", size))
    if made is None:
        made = mask.cache[("flex", size)] = _block_mask(mask, size)
    assert isinstance(made, BlockMask)
    return made


def _block_mask(mask: Mask, size: int) -> BlockMask:
    first, stop = mask.reach
    place, row_document, column_document = mask.column_places, mask.row_document, mask.column_document

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        here = place[column]
        same = row_document[batch, row] == column_document[batch, column]
        return (first[batch, row] <= here) & (here < stop[batch, row]) & same

    # Each query sees one run of places, so the ends of the runs of a block decide what it needs and what is whole.
    lowest, least = blocks(first, size, "amin"), blocks(stop, size, "amin")
    greatest, furthest = blocks(first, size, "amax"), blocks(stop, size, "amax")
    head, tail = place[::size], blocks(place[None], size, "amax")[0]
    needed = (head < furthest[..., None]) & (tail >= lowest[..., None])
    whole = (head >= greatest[..., None]) & (tail < least[..., None]) & mask.contiguous
    # The last block may be cut short; a full one is not looked at again.
    whole[..., len(place) // size :] = False
    return BlockMask.from_kv_blocks(
        *_ordered(needed & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=size,
        mask_mod=visible,
        seq_lengths=(first.shape[1], len(place)),
    )


def blocks(x: Tensor, size: int, reduce: str) -> Tensor:
    """[b, s] -> [b, blocks], the least or greatest of each."""
    short = -x.shape[1] % size
    # A block that is cut short repeats its last entry.
    x = torch.cat([x, x[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, size))
    return x.amin(2) if reduce == "amin" else x.amax(2)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[b, rows, columns] bool -> how many of each row, and their numbers first: int32, with an axis for heads."""
    count = chosen.sum(-1, dtype=torch.int32)
    numbers = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None].contiguous(), numbers[:, None].contiguous()
