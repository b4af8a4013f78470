"""What a caller needs to know of context parallelism: which part of its tensors a rank's output belongs to.

The model is given whole rows on every rank; its logits and losses are for this rank's part. A loop takes the same part
of its loss mask:

    losses = model(input_ids, labels=labels)            # [b, s / cp]
    loss = (losses * take(loss_mask, groups.cp)).sum()  # summed over the ranks by Megatron's DDP (per-token loss)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.megatron.zigzag import Zigzag, places


def take(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's part of `x`, whose axis `dim` is the whole row. Raises ParallelError if 2 * cp does not divide it."""
    if group.size() == 1:
        return x
    return Zigzag.of(x.shape[dim], group).take(x, dim)


def gather(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """The whole row from every rank's part of it, on every rank. The inverse of `take`; without a gradient."""
    size = group.size()
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    zigzag = Zigzag.of(x.shape[dim] * size, group)
    order = places([span for rank in range(size) for span in zigzag.spans(rank)], x.device)
    return torch.cat(parts, dim).index_select(dim, order.argsort())


def gather_alike(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """`gather`, of which every rank then computes the same: the gradient is that of this rank's part of it."""
    return x if group.size() == 1 else _GatherAlike.apply(x, group, dim)


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return take(gradients[0], ctx.group, ctx.dim), None, None
