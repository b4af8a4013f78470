"""Towers in a step: trained where the step has media for them, else left exactly as they are.

A tower and its projector that no rank used in a step have no gradient, only zeros that answer for them in Megatron's
buffers. Adam would still move them: by weight decay and by what is left of its momentum. Torch's own optimizers leave a
parameter without a gradient out, its moments and its count of updates included; so does this. Text in a multimodal run
never makes the towers drift, and a run on text alone returns them bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from bridge.geometry import Geometry
from bridge.mapping.modalities import MODALITIES
from bridge.megatron.model import Gemma4Model
from bridge.megatron.multimodal import Gemma4MultimodalModel, MediaTensors
from bridge.megatron.visibility import FORWARD, vision_masks

# What of a batch only the first pipeline stage takes.
MEDIA_NAMES = frozenset(field.name for field in fields(MediaTensors))


def modalities_in(batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """For every one of `MODALITIES`, 1 where any of this rank's microbatches has media for it, else 0."""
    return [float(any(name in batch for batch in batches for name in each.given_by)) for each in MODALITIES.values()]


def mask_change(geometry: Geometry, now: str, before: str | None, updates: int) -> str | None:
    """What has to be said where a run goes on under another `model.vision_mask` than its images had.

    `before`: None of checkpoints of 0.1, which did not note it and had no other than `forward`'s. `updates`: so many
    that images or video took part in.
    """
    was = FORWARD if before is None else before
    if not updates or was == now or was not in vision_masks(geometry):
        return None
    why = ", the only one of release 0.1" if before is None else ""
    return (
        f"model.vision_mask: images and video of the updates so far were under {was}{why}; from here on they are under "
        f"{now}, which masks differently (docs/attention.md); model.vision_mask={was} goes on as before"
    )


def modality_of(models: Sequence[Gemma4Model]) -> dict[Tensor, str]:
    """The modality of every trained parameter that belongs to one, of this rank's models."""
    return {
        parameter: modality
        for model in models
        if isinstance(model, Gemma4MultimodalModel)
        for modality in MODALITIES
        for parameter in model.media_parameters(modality)
    }


@torch.no_grad()
def leave_out(optimizer: MegatronOptimizer, idle: Collection[Tensor]) -> None:
    """Take the gradients of `idle` parameters from the optimizer, after `prepare_grads` and before its step."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter in idle:
            # Of the parameters that another rank updates, this one has no piece.
            if parameter in part.model_param_group_index_map:
                group, place = part.model_param_group_index_map[parameter]
                piece = part.optimizer.param_groups[group]["params"][place]
                piece.grad = piece.decoupled_grad = None
