"""Softmax over a vocabulary of which each tensor-parallel rank has some words."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def logsumexp(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of [n, words], over the words of all ranks of `group` (None: this one's are all): [n]."""
    top = logits.amax(-1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = (logits - top[:, None]).exp_().sum(-1)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.log_().add_(top)


def log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of [n, words], in place, over the words of all ranks of `group`."""
    return logits.sub_(logsumexp(logits, group)[:, None])
