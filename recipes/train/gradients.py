"""The gradients that a step left, all at a time: their norm, and how they are clipped.

Megatron's own way without Transformer Engine or Apex goes parameter by parameter, and reads every one's norm on the
host, where a GPU is waited for each time. With torch's multi-tensor functions the host waits once a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

# As in torch's `clip_grad_norm_`.
_EPS = 1e-6


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> float:
    """Of all gradients as one vector, each of them once, on whatever ranks they are. Collective.

    After `prepare_grads`. Which gradients count on which rank is Megatron's rule (`get_grads_for_grad_norm`).
    """
    squares: dict[dist.ProcessGroup, Tensor] = {}
    for part in optimizer.chained_optimizers:
        group = part.get_grad_stats_parallel_group()
        square = squares.setdefault(group, torch.zeros((), device=device))
        gradients = part.get_grads_for_grad_norm()
        if gradients:
            square += torch.nn.utils.get_total_norm(gradients).square()
    for group, square in squares.items():
        dist.all_reduce(square, group=group)
    return float(torch.stack(list(squares.values())).sum().sqrt())


@torch.no_grad()
def clip_gradients(optimizer: MegatronOptimizer, largest: float, norm: float) -> None:
    """Shrink all gradients, in place, so that their `norm` becomes `largest`, where it is above."""
    factor = largest / (norm + _EPS)
    if factor >= 1.0:
        return
    for part in optimizer.chained_optimizers:
        decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        name = "decoupled_grad" if decoupled else "grad"
        held = (getattr(parameter, name, None) for parameter in part.get_parameters())
        gradients = [gradient for gradient in held if gradient is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
