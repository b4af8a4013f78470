"""The norm of all gradients, and clipping by it: over all tensors at once, in place, with one read of the device.

Megatron's own are that only with Transformer Engine or Apex. Without, the host waits once for every tensor, and each is
scaled through a copy of it: of a per-layer embedding table, gigabytes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

# As in Megatron and torch: what is added to the norm that is divided by.
_EPS = 1e-6


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of all gradients of all ranks, after `prepare_grads`: each counted once. Collective."""
    total = torch.zeros((), device=torch.cuda.current_device())
    for part in optimizer.chained_optimizers:
        square = torch.zeros_like(total)
        gradients = part.get_grads_for_grad_norm()
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
        # Experts have other copies than the rest: every part knows the ranks over which its own are spread.
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        total += square
    return float(total.sqrt())


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, norm: float, largest: float) -> None:
    """Scale the gradients, whose norm is `norm`, to one of `largest` where it is above that."""
    factor = largest / (norm + _EPS)
    if factor >= 1:
        return
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            found = (getattr(p, "decoupled_grad" if decoupled else "grad", None) for p in part.get_parameters())
            gradients: list[Tensor] = [gradient for gradient in found if gradient is not None]
            torch._foreach_mul_(gradients, factor)
