"""What a rank computes in a step: the FLOPs of its forward and backward passes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from recipes.data.collate import KL
from recipes.losses.objective import Objective
from recipes.train.passes import Batch, mismatched_rows
from recipes.train.reference import reference_of
from recipes.train.setup import Run
from recipes.train.workload import forward_flops, training_flops


def step_flops(run: Run, batches: Sequence[Batch], objective: Objective, frozen: Collection[str]) -> float:
    """This rank's part of the whole step's: one rank counts for all of its replica. `frozen`: modalities not trained.

    Where a drafter alone is trained, of its model's forward pass.
    """
    groups = run.groups
    if groups.tp.rank() or groups.cp.rank() or groups.pp.rank():
        return 0.0
    geometry, vision_mask = run.bridge.geometry, run.config.vision_mask
    if run.drafts_alone:
        return forward_flops(geometry, batches, vision_mask)
    flops = training_flops(geometry, batches, frozen, run.lora is not None, vision_mask)
    if run.teacher is not None:
        flops += forward_flops(run.teacher.config.geometry, batches, vision_mask)
    others = _without_gradients(run, batches, objective)
    return flops + sum(forward_flops(geometry, more, vision_mask) for more in others)


def _without_gradients(run: Run, batches: Sequence[Batch], objective: Objective) -> list[Sequence[Batch]]:
    """What of a step goes through once more, for its reference and for KTO's divergence."""
    based = objective.referenced and reference_of(run.recipe) == "base"
    behind = [mismatched_rows(batch) for batch in batches if any(name.startswith(KL) for name in batch)]
    return [batches, behind, behind] if based else [behind]
