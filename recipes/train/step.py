"""One step: microbatches through Megatron's schedule, the loss of them all, and the optimizer's update."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bridge.megatron.context_parallel import take
from recipes.losses.objective import Objective, by_source, source_ids
from recipes.losses.policy import evaluated_objective
from recipes.train.gradients import clip_gradients, gradient_norm
from recipes.train.media import leave_out
from recipes.train.passes import Batch, Passed, Prepared, through
from recipes.train.reference import settled
from recipes.train.setup import BuiltModel, Run

# What is summed beside the objective's own figures: real tokens, all there are, the squared log-sum-exp, where there is
# a z-loss, and how many labels are the likeliest, where asked.
SUMS = ("real", "slots", "squares", "correct")


def run_microbatches(
    run: BuiltModel,
    batches: Sequence[Batch],
    *,
    train: bool,
    accuracy: bool = False,
    objective: Objective | None = None,
    sources: int = 1,
) -> Tensor:
    """Forward (and backward, where `train`) passes of this rank's microbatches. `accuracy`: count right tokens too;
    `objective`: in the place of what evaluations of the recipe measure. `sources`: of how many the data is.

    Returns this rank's part of the objective's `names`, of `SUMS`, and where there are several sources of the `names`
    of each, float64: zeros but on one tensor-parallel rank of the last stage. Gradients are of the objective's mean
    over what it counts, of all microbatches, data-parallel and context-parallel ranks.
    """
    objective, prepared = settled(run, objective or evaluated_objective(run.recipe), batches, train)
    z_loss = run.recipe.train.z_loss if train else 0.0
    if train and run.recipe.train.aux_loss:
        _scale_auxiliary_loss(run, objective, prepared)
    total = partial(_total, objective=objective, z_loss=z_loss, cp=run.groups.cp, sources=sources)
    reports = through(run, prepared, total, train=train, z_loss=z_loss, accuracy=accuracy)
    size = len(objective.names) * (sources + 1 if sources > 1 else 1) + len(SUMS)
    sums = torch.zeros(size, dtype=torch.float64, device=run.device)
    if run.groups.tp.rank() == 0:
        for report in reports:
            sums += report["sums"]
    return sums


def _total(
    losses: Tensor, passed: Passed, objective: Objective, z_loss: float, cp: dist.ProcessGroup, sources: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    batch = passed.batch
    loss, count, figures = objective.sums(losses, batch, cp, sources)
    if z_loss:
        # Part of the gradient, and not of the loss that is told.
        figures[:, 0] -= z_loss * by_source(passed.squares, source_ids(batch, cp), sources)
    mask = batch.get("attention_mask")
    # Filled there: to send a number would be to wait for the device.
    slots = torch.full_like(count, losses.shape[0] * losses.shape[1])
    real = slots if mask is None else take(mask, cp).sum()
    common = torch.stack([each.double() for each in (real, slots, passed.squares.sum(), passed.correct)])
    several = [figures.flatten()] if sources > 1 else []
    return loss, count.to(torch.int), {"sums": torch.cat([figures.sum(0), common, *several])}


def _scale_auxiliary_loss(run: BuiltModel, objective: Objective, microbatches: Sequence[Prepared]) -> None:
    """Have a step's auxiliary loss be a mean over all tokens, whatever the objective is a mean over. Collective.

    Megatron weighs that of a microbatch by its tokens, and in the end divides every gradient by what the objective
    counts (tokens with a label): without this, what was asked for would be multiplied by the ratio of the two.
    """
    counted = torch.stack([objective.count(microbatch.batch) for microbatch in microbatches]).sum()
    tokens = sum(microbatch.batch["labels"].numel() for microbatch in microbatches)
    total = torch.stack([counted, counted.new_full((), tokens)])
    dist.all_reduce(total)
    run.config.moe_grad_scale_func = lambda: (total[0] / total[1])[None]


def reduce_sums(sums: Tensor) -> list[float]:
    """Sum over all ranks, as numbers that every rank has alike."""
    dist.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values


def any_rank(here: bool, device: torch.device) -> bool:
    """Whether something is so on any rank, on every rank alike. Collective."""
    return reduce_sums(torch.tensor([float(here)], dtype=torch.float64, device=device))[0] > 0


def clear_gradients(run: Run) -> None:
    """Before the first microbatch of a step."""
    for chunk in run.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    run.optimizer.zero_grad()


@torch.profiler.record_function("optimizer")
def update(run: Run, largest_norm: float, idle: Collection[Tensor] = ()) -> tuple[float, bool]:
    """Clip and step; (gradient norm before clipping, whether the weights changed). Alike on every rank.

    As Megatron's own `step()`, but an update whose norm is not finite, or above `largest_norm`, is left out: there a
    NaN would reach the weights. `idle`: parameters of towers that no rank had media for in this step
    (see `media.py`).
    """
    optimizer = run.optimizer
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer, run.device)
    if not math.isfinite(norm) or norm > largest_norm:
        return norm, False
    if run.recipe.optimizer.clip:
        clip_gradients(optimizer, run.recipe.optimizer.clip, norm)
    leave_out(optimizer, idle)
    optimizer.step_with_ready_grads()
    return norm, True
