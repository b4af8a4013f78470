"""The learning rate of every step: Megatron's schedule, and what is said where a run that goes on has another one."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron.core.optimizer import MegatronOptimizer

from recipes.config import Recipe
from recipes.train.rates import Schedule, factors
from recipes.training_config import OptimizerConfig


def fitted(recipe: Recipe) -> OptimizerConfig:
    """The optimizer's keys, with a warm-up and a decay that leave something of `train.steps`: of a short trial a tenth
    and a fifth."""
    wanted, steps = recipe.optimizer, recipe.train.steps
    warmup = wanted.warmup if wanted.warmup < steps else steps // 10
    decay = wanted.wsd_steps
    if wanted.schedule == "wsd" and decay > steps - warmup:
        warmup, decay = min(warmup, steps // 10), max(1, steps // 5)
    return replace(wanted, warmup=warmup, wsd_steps=decay)


def shortened(recipe: Recipe) -> list[str]:
    """What `fitted` has changed, in words."""
    wanted, has = recipe.optimizer, fitted(recipe)
    return [
        f"optimizer.{key}={getattr(wanted, key)} leaves nothing of train.steps={recipe.train.steps}: it is "
        f"{getattr(has, key)} in this run"
        for key in ("warmup", "wsd_steps")
        if getattr(wanted, key) != getattr(has, key)
    ]


def make_scheduler(recipe: Recipe, optimizer: MegatronOptimizer) -> Schedule:
    """Megatron's schedule, counted in steps; `step(1)` goes behind every update, as in Megatron's own loop.

    Step k of N, with W of warm-up, has the rate `lr` · k / (W + 1) up to W; from W + 1 on, which has `lr` itself, what
    transformers' `get_scheduler` gives for the same numbers. No step has the rate 0, and `min_lr` is where step N + 1
    would be.
    """
    wanted, steps = fitted(recipe), recipe.train.steps
    wsd = wanted.schedule == "wsd"
    return Schedule(
        optimizer,
        init_lr=wanted.lr / (wanted.warmup + 1),
        max_lr=wanted.lr,
        min_lr=wanted.min_lr,
        lr_warmup_steps=wanted.warmup,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if wsd else wanted.schedule,
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=wanted.wsd_steps if wsd else None,
        lr_wsd_decay_style=wanted.wsd_style if wsd else None,
    )


def rate(scheduler: Schedule) -> float:
    """Of the next step, and of what is in no group, on ranks too that have no parameter to train."""
    return float(scheduler.get_lr({}))


def group_rates(recipe: Recipe, scheduler: Schedule) -> dict[str, float]:
    """Of the step to come, by the names that the log gives them: that of each of `optimizer.lr_groups`."""
    return {f"lr/{name}": rate(scheduler) * factor for name, factor in factors(recipe).items()}


def advance(recipe: Recipe, scheduler: Schedule) -> dict[str, float]:
    """Go on to the next step; {"rate": of the step that was, "next": of the one to come, "steps": of the schedule}, and
    those of groups that come."""
    before = rate(scheduler)
    scheduler.step(1)
    return {"rate": before, "next": rate(scheduler), "steps": recipe.train.steps} | group_rates(recipe, scheduler)


def rate_change(recipe: Recipe, scheduler: Schedule, step: int, before: dict[str, float]) -> str | None:
    """What has to be said where the next step after `step` has other rates than the run's own schedule gave it.

    `before`: what `advance` gave when the run was saved; {} of older checkpoints.
    """
    now = rate(scheduler)
    if not before or step >= recipe.train.steps:
        return None
    if math.isclose(now, before["next"], rel_tol=1e-6):
        return _group_change(group_rates(recipe, scheduler), step, before)
    why = "optimizer.* is another"
    if recipe.train.steps != before["steps"]:
        why = f"train.steps was {before['steps']:g}, is {recipe.train.steps}"
    return (
        f"{why}: the learning rate of step {step + 1} is {now:.4g}, where step {step} had {before['rate']:.4g} and "
        f"{before['next']:.4g} was to come; optimizer.schedule=constant optimizer.lr={before['rate']:.4g} "
        "optimizer.min_lr=0 optimizer.warmup=0 would keep it"
    )


def _group_change(now: dict[str, float], step: int, before: dict[str, float]) -> str | None:
    then = {name: rate for name, rate in before.items() if name.startswith("lr/")}
    changed = [
        f"{name.removeprefix('lr/')} {now.get(name, before['next']):.4g}, where "
        f"{then.get(name, before['next']):.4g} was to come"
        for name in dict.fromkeys((*now, *then))
        if not math.isclose(now.get(name, before["next"]), then.get(name, before["next"]), rel_tol=1e-6)
    ]
    return f"optimizer.lr_groups is another: of step {step + 1} " + ", ".join(changed) if changed else None
