"""How evenly the router fills the experts, and what the auxiliary loss says of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from torch import Tensor

from bridge.geometry import Geometry
from bridge.megatron.model import Gemma4Model
from bridge.megatron.moe import Gemma4Router


def take_load(geometry: Geometry, models: Sequence[Gemma4Model], device: torch.device) -> Tensor | None:
    """Tokens that went to each expert of each layer since this was last asked: float64 [layers, experts]. Collective.

    Of training alone, padding included, since it is computed like the rest. None for a model without experts.
    """
    if geometry.moe is None:
        return None
    load = torch.zeros(geometry.num_layers, geometry.moe.num_experts, dtype=torch.float64, device=device)
    for model in models:
        for module in model.modules():
            if isinstance(module, Gemma4Router) and module.load is not None:
                load[module.layer_number - 1] += module.load
                module.load = None
    dist.all_reduce(load)
    return load


def load_values(load: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """What is logged of it. 1 is an even share; the least and the most of any layer, and apart each expert's mean."""
    share = load / load.sum(1, keepdim=True) * load.shape[1]
    values = {"expert_load_min": float(share.min()), "expert_load_max": float(share.max())}
    return values, {f"expert_load/{expert}": value for expert, value in enumerate(share.mean(0).tolist())}


def forget_auxiliary_loss() -> None:
    """Before a run: Megatron notes these losses for the process, whichever run they are of."""
    destroy_moe_metrics_tracker()


def take_auxiliary_loss(geometry: Geometry, microbatches: int, dp_size: int, device: torch.device) -> float:
    """Mean over layers and `microbatches`, those of each data-parallel rank since this was last asked. Collective.

    Without the factor `train.aux_loss`: experts x sum of (share of the choices) x (mean probability), 1 where even.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    noted = get_moe_metrics_tracker().metrics.get("load_balancing_loss")
    if noted is not None:
        # A layer's losses are where the layer is, under tensor and context parallelism in parts.
        total += noted.values.sum()
        noted.values.zero_()
    dist.all_reduce(total)
    return float(total) / (geometry.num_layers * microbatches * dp_size)
