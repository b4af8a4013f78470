"""Which layout to train in: all that fit by their predicted seconds, and the first of them simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.mapping import table_for
from bridge.mapping.table import Table
from recipes.config import CONFIGS, ParallelConfig, Recipe, load_recipe, resolve
from recipes.memory.estimate import RESERVE, TrainingPlan, estimate
from recipes.memory.recipe import geometry_of, plan_of
from recipes.memory.search import Proposal, layouts, search
from recipes.simulate.hardware import Hardware
from recipes.simulate.run import Forecast, Simulation, Simulator, forecast, why, with_layout


@dataclass(frozen=True)
class Question:
    """What is to be trained on `gpus` of `hardware`, each of which has `budget` bytes."""

    recipe: Recipe
    geometry: Geometry
    table: Table
    gpus: int
    hardware: Hardware
    budget: int

    @property
    def steps(self) -> int:
        return self.recipe.train.steps


def is_recipe(name: str) -> bool:
    """Whether that is a recipe, not a model."""
    return (CONFIGS / f"{name}.yaml").is_file() or Path(name).suffix in (".yaml", ".yml")


def recipe_of(name: str, said: dict[str, Any]) -> Recipe:
    """A recipe, or one that trains the model of that name; `said`: overrides of it, by their keys."""
    overrides = [f"{key}={value}" for key, value in said.items() if value is not None]
    if is_recipe(name):
        return load_recipe(name, ["output=unused", *overrides])
    steps = {"train": {"steps": 1000, "seq_length": 8192, "global_batch_size": 64}}
    return resolve({"output": "unused", "model": {"hf": name}, **steps}, overrides)


def ask(recipe: Recipe, gpus: int, hardware: Hardware, gpu_memory: float | None) -> Question:
    """`gpu_memory` [GB]: in the place of the profile's. Raises UsageError."""
    model = recipe.model.hf or recipe.model.megatron
    if model is None:
        raise UsageError("set exactly one of model.hf and model.megatron")
    geometry = geometry_of(model)
    budget = hardware.bytes if gpu_memory is None else round(gpu_memory * 1e9)
    return Question(recipe, geometry, table_for(geometry), gpus, hardware, budget)


def proposals(question: Question) -> list[Proposal]:
    """Layouts that fit, by their predicted seconds. Raises UsageError where none does."""
    recipe = question.recipe
    # Of the whole batch on one GPU: what the recipe says of its layout is what is looked for.
    one_gpu = replace(recipe, parallel=ParallelConfig(dispatcher=recipe.parallel.dispatcher))
    wanted = replace(plan_of(one_gpu, 1, question.table), world_size=question.gpus)
    batch = recipe.train.global_batch_size
    found = search(question.table, wanted, question.budget, batch, question.hardware)
    if not found:
        raise UsageError(_nothing_fits(question, wanted))
    return found


def _nothing_fits(question: Question, wanted: TrainingPlan) -> str:
    tries = [
        replace(wanted, parallel=parallel, load=replace(wanted.load, recompute="full"))
        for parallel in layouts(question.table, question.gpus)
        if question.recipe.train.global_batch_size % (parallel.dp(question.gpus) * wanted.load.rows) == 0
    ]
    model = question.recipe.model.hf or question.recipe.model.megatron
    where = f"{model} on {question.gpus} × {question.budget / 1e9:g} GB"
    if not tries:
        batch = question.recipe.train.global_batch_size
        return f"{where}: no layout divides train.global_batch_size={batch} among its replicas"
    least = min(estimate(question.table, plan).total for plan in tries)
    adapted = "" if wanted.lora_rank else " (--lora needs less)"
    return f"{where}: nothing fits; the least is {(least + RESERVE) / 1e9:.0f} GB a GPU{adapted}"


def recipe_in(question: Question, proposal: Proposal) -> Recipe:
    """The recipe in a proposal's layout."""
    load = proposal.plan.load
    return with_layout(question.recipe, proposal.plan.parallel, load.recompute, load.recompute_modules)


def simulated(question: Question, chosen: Sequence[Proposal]) -> list[tuple[Proposal, Forecast]]:
    """A simulated step of each, the quickest that fits first."""
    with Simulator() as simulator:
        recipes = [recipe_in(question, proposal) for proposal in chosen]
        found: list[Simulation] = simulator.run(recipes, question.geometry, question.gpus)
    told = [forecast(one, question.geometry, question.hardware) for one in found]
    pairs = list(zip(chosen, told, strict=True))
    return sorted(pairs, key=lambda pair: (pair[1].simulation.need > question.budget, pair[1].seconds))


def as_json(one: Forecast, steps: int) -> dict[str, Any]:
    """A forecast, for programs; bytes and calls of collectives are of the microbatches that were simulated."""
    fullest = one.simulation.fullest.memory
    return {
        "seconds": round(one.seconds, 4),
        "seconds_range": [round(x, 4) for x in one.span],
        "tokens_per_s": round(one.tokens_per_s),
        "mfu": round(one.mfu, 4),
        "bubble": round(one.step.bubble, 4),
        "gb": round(one.simulation.need / 1e9, 2),
        "gpu_hours": round(one.gpu_hours(steps), 1),
        "dollars": round(one.dollars(steps), 2),
        "steps": steps,
        "parts": {name: round(seconds, 4) for name, seconds in one.step.parts.items()},
        "memory": {
            "weights": fullest.weights,
            "gradients": fullest.gradients,
            "optimizer": fullest.optimizer,
            **fullest.at_peak,
        },
        "microbatches": one.simulation.microbatches,
        "microbatches_simulated": one.simulation.ranks[0].microbatches,
        "collectives": [
            {"stage": stage, "for": purpose, "kind": kind, "bytes": size, "calls": calls}
            for (stage, purpose, kind), (size, calls) in one.simulation.traffic().items()
        ],
    }


def explained(question: Question, found: Sequence[tuple[Proposal, Forecast]]) -> Iterator[str]:
    """Lines: what the best takes and costs, where its seconds go, and what the others lose."""
    best, doubt = found[0][1], question.hardware.uncertainty
    low, high = best.span
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best.step.parts.items() if seconds >= 0.005)
    yield (
        f"simulated, not run: {best.simulation.parallel} on {question.gpus} × {question.hardware.name}: "
        f"{best.seconds:.2f} s a step ({low:.2f} to {high:.2f}, ± {doubt:.0%}), {best.tokens_per_s:,.0f} tokens/s, "
        f"MFU {best.mfu:.1%}, bubble {best.step.bubble:.1%}"
    )
    yield f"  seconds: {parts}"
    yield (
        f"  {question.steps:,} steps: {best.gpu_hours(question.steps):,.0f} GPU-hours, "
        f"{best.dollars(question.steps):,.0f} dollars at {question.hardware.dollars_per_gpu_hour:g} an hour"
    )
    for _, other in found[1:]:
        yield f"  {why(best, other)}"
